"""Attention over short sequences by the compiled library: ``softmax(q k^T scale) v``.

torch's own turns and copies every head for a general matrix product, which is most of its time where there are some
tens of tokens: on one machine 0.7 ms of a layer of MiniLM's size for 16 sentences of 32 tokens, against 0.25 ms here.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from layerwise.kernels.library import Attention, chosen_path, required

LONGEST_HEAD, HEAD_STEP = 128, 32
MOST_KEYS = 1024
FAST_PATHS = ("avx512", "avx2")


def attention_takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether ``attend`` is for these: float32 values on the CPU, of sizes that it knows, with no gradient.

    Only where the chosen path has wide registers: elsewhere torch's own is faster.
    """
    return chosen_path() in FAST_PATHS and _fits(q, k, v, mask)


def _fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    given = (q, k, v)
    if any(type(t) is not Tensor for t in given) or any(
        t.dim() != 4 or t.dtype != torch.float32 or t.stride(3) != 1 for t in given
    ):
        return False
    if any(t.device.type != "cpu" or (t.requires_grad and torch.is_grad_enabled()) for t in given):
        return False
    sequences, heads, queries, dim = q.shape
    keys = k.shape[2]
    if k.shape != (sequences, heads, keys, dim) or v.shape != k.shape or not q.numel() or not 0 < keys <= MOST_KEYS:
        return False
    if dim % HEAD_STEP or dim > LONGEST_HEAD:
        return False
    whole = (sequences, 1, queries, keys)
    if mask is None:
        return True
    sides = mask.dim() == 4 and all(own in (1, side) for own, side in zip(mask.shape, whole, strict=True))
    return sides and mask.dtype == torch.bool and mask.device.type == "cpu"


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, path: str | None = None
) -> Tensor:
    """``[sequences, heads, tokens, dim]`` each -> ``[sequences, queries, heads, dim]``, contiguous.

    mask: bool, broadcast to ``[sequences, 1, queries, keys]``; false where a key is not seen. A query that sees none
    gets zeros. The result has the same bits on every path and for any number of threads.
    """
    loaded, path = required(path)
    if not _fits(q, k, v, mask):
        raise ValueError("attention takes float32 [sequences, heads, tokens, dim] on the CPU, dim 32, 64, 96 or 128")
    sequences, heads, queries, dim = q.shape
    out = torch.empty(sequences, queries, heads, dim)
    seen = seen_keys(mask, sequences, queries, k.shape[2])
    asked = Attention(
        sequences, heads, queries, k.shape[2], dim, q.data_ptr(), k.data_ptr(), v.data_ptr(), *map(_strides, (q, k, v)),
        None if seen is None else seen.data_ptr(), (0, 0) if seen is None else (seen.stride(0), seen.stride(2)),
        out.data_ptr(), path.encode(), scale, 0,
    )  # fmt: skip
    status = loaded.layerwise_attend(ctypes.byref(asked), ctypes.sizeof(asked), torch.get_num_threads())
    if status == 3:
        raise MemoryError("no memory for attention")
    if status:
        raise ValueError(f"the compiled kernels have no path {path!r} here")
    return out


def seen_keys(mask: Tensor | None, sequences: int, queries: int, keys: int) -> Tensor | None:
    """A mask ``[sequences, 1, queries, keys]`` as the library reads it: a query's keys beside one another."""
    if mask is None:
        return None
    seen = mask.expand(sequences, 1, queries, keys)
    return seen if seen.stride(3) == 1 else seen.contiguous()


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)
