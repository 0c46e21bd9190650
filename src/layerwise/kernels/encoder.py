"""A transformer block of an encoder by one call of the compiled library, its six matrices packed.

    a = heads(x),  h = norm(x + a),  y = norm(h + down(gelu(up(h))))              norms behind (BERT)
    h = x + heads(norm(x)),  y = h + down(gelu(up(norm(h))))                      norms in front (ViT)

Products round their inputs as ``PackedMatrix.multiply`` does and give its bits; query, key and value share one
rounding. Layer norms, GELU (the exact one) and the softmax are computed in float32, to about 1e-6, the same bits on
every path and for any number of threads.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.kernels.attention import HEAD_STEP, LONGEST_HEAD, MOST_KEYS, seen_keys
from layerwise.kernels.library import EncoderBlock, required
from layerwise.kernels.matrix import PackedMatrix

LINEARS = ("query", "key", "value", "out", "up", "down")


@dataclass(frozen=True, eq=False)
class Norm:
    """``(x - mean) / sqrt(variance + epsilon) * weight + shift`` over the features; float32 [width] each."""

    weight: Tensor
    shift: Tensor | None
    epsilon: float


class PackedBlock:
    """Matrices, biases (float32 [rows] or None, in the order of ``LINEARS``) and the two norms of a block.

    Raises ``ValueError`` where they do not make one: tables of levels, shapes that do not follow one another, heads
    that are not of 32, 64, 96 or 128 features.
    """

    def __init__(
        self,
        matrices: tuple[PackedMatrix, ...],
        biases: tuple[Tensor | None, ...],
        norms: tuple[Norm, Norm],
        heads: int,
        *,
        scale: float,
        norms_first: bool,
    ) -> None:
        self.width, inner = matrices[0].columns, matrices[4].rows
        shapes = [(self.width, self.width)] * 4 + [(inner, self.width), (self.width, inner)]
        if any(m.table for m in matrices) or [(m.rows, m.columns) for m in matrices] != shapes:
            raise ValueError("a block has four matrices [width, width], one [inner, width] and one [width, inner]")
        if not head_fits(self.width, heads):
            raise ValueError(f"{heads} heads of a width of {self.width} are not of 32, 64, 96 or 128 features")
        self.heads, self.scale, self.norms_first = heads, scale, norms_first
        self.matrices, self.biases, self.norms = matrices, biases, norms
        self._describe()

    def _describe(self) -> None:
        """What is the same at every call, and where the vectors lie."""
        given = [(b, m.rows) for b, m in zip(self.biases, self.matrices, strict=True)]
        given += [(t, self.width) for norm in self.norms for t in (norm.weight, norm.shift)]
        if any(t is not None and not plain(t, size) for t, size in given):
            raise ValueError("biases and norms are float32 vectors on the CPU, as long as what they are added to")
        self._places = [(t, t.data_ptr()) for t, _ in given if t is not None]
        first, second = self.norms
        self._described = EncoderBlock(
            width=self.width, heads=self.heads, matrix=tuple(m.handle for m in self.matrices),
            bias=tuple(address(b) for b in self.biases),
            weight=(first.weight.data_ptr(), second.weight.data_ptr()),
            shift=(address(first.shift), address(second.shift)), epsilon=(first.epsilon, second.epsilon),
            scale=self.scale, norms_first=self.norms_first,
        )  # fmt: skip

    def in_place(self) -> bool:
        """Whether biases and norms lie where they lay, as those do not whose type or device was changed."""
        return all(tensor.data_ptr() == place for tensor, place in self._places)

    def wants_gradient(self) -> bool:
        return any(tensor.requires_grad for tensor, _ in self._places)

    def run(
        self, x: Tensor, mask: Tensor | None = None, *, int8: bool, path: str | None = None, together: int = 0
    ) -> Tensor:
        """``[sequences, tokens, width]`` float32 on the CPU -> the same shape.

        mask: bool ``[sequences or 1, 1, tokens or 1, tokens]``; false where a key is not seen. int8: round the inputs
        of products to int8. together: how many sequences a thread takes through the block at once, -1 for all threads
        on every step; 0 leaves it to the library. It changes no bit.
        """
        loaded, path = required(path)
        if not takes(x, mask, self.width):
            raise ValueError(f"a block takes float32 [sequences, 1 to {MOST_KEYS} tokens, {self.width}] on the CPU")
        sequences, tokens, _ = x.shape
        x = x.detach().contiguous()
        y = torch.empty_like(x)
        seen = seen_keys(mask, sequences, tokens, tokens)
        if not self.in_place():
            self._describe()
        asked = EncoderBlock.from_buffer_copy(self._described)
        asked.sequences, asked.tokens, asked.together = sequences, tokens, together
        asked.x, asked.y, asked.digits, asked.path = x.data_ptr(), y.data_ptr(), 1 if int8 else 3, path.encode()
        if seen is not None:
            asked.mask, asked.mask_stride = seen.data_ptr(), (seen.stride(0), seen.stride(2))
        status = loaded.layerwise_encode(ctypes.byref(asked), ctypes.sizeof(asked), torch.get_num_threads())
        if status == 3:
            raise MemoryError("no memory for a block of an encoder")
        if status:
            raise ValueError(f"the compiled kernels have no path {path!r} here, or do not take this block")
        return y


def head_fits(width: int, heads: int) -> bool:
    """Whether the library's attention is for heads of that size."""
    dim, rest = divmod(width, max(heads, 1))
    return heads > 0 and rest == 0 and dim % HEAD_STEP == 0 and 0 < dim <= LONGEST_HEAD


def takes(x: Tensor, mask: Tensor | None, width: int) -> bool:
    """Whether ``run`` is for these: plain float32 values on the CPU, a mask of bools or none, no gradient."""
    if type(x) is not Tensor or x.dim() != 3 or x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    sequences, tokens, own = x.shape
    if own != width or not 0 < tokens <= MOST_KEYS or (x.requires_grad and torch.is_grad_enabled()):
        return False
    if mask is None:
        return True
    whole = (sequences, 1, tokens, tokens)
    sides = mask.dim() == 4 and all(own in (1, side) for own, side in zip(mask.shape, whole, strict=True))
    return sides and mask.dtype == torch.bool and mask.device.type == "cpu"


def plain(tensor: Tensor, size: int) -> bool:
    return (
        tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.shape == (size,)
        and tensor.is_contiguous()
    )


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
