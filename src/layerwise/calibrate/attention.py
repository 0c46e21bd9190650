"""How much attention the tokens of a block receive: their importance.

Every attention of transformers (LLaMA, BERT, GPT-2, ViT, …) ends in one torch function,
``scaled_dot_product_attention``, which is given the queries and keys as they are compared: after rotary positions, with
the mask, the scale and the sharing of key heads that this network has. While a watch is on, calls of that function are
noted and carried out as they are; the probabilities are then computed again from what was noted,

    A[h, t, i] = softmax_i(scale q_t k_i + mask),      a_i = sum_h sum_t A[h, t, i]

over the queries ``t`` that are not padding. So nothing is read off the names of modules, and the block runs as always.
A token's importance ``u`` is ``a`` mapped linearly per sequence to [0, 1]; where all tokens receive alike it is 1.

Source of the importance: Y.-L. Sung et al., *RSQ*, arXiv 2503.01820 (attention concentration).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from layerwise.network.streaming import Batch

ATTENTION = torch.nn.functional.scaled_dot_product_attention


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    """The signature of the watched function, which is built in and has none to look up."""


SIGNATURE = inspect.signature(_arguments)


@dataclass(frozen=True)
class Attention:
    """One call. query ``[sequences, heads, T, d]``; key and value ``[sequences, key heads, T, d]``; mask as given.

    output: ``[sequences, heads, T, d]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    output: Tensor

    def probabilities(self, sequence: int) -> Tensor:
        """``A`` of one sequence, ``[heads, T, T]`` float32; a query that may attend to nothing attends to nothing."""
        query, key = self.query[sequence].detach().float(), self.of_heads(self.key, sequence)
        scores = query @ key.transpose(-1, -2) * self.scale
        if self.causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~seen, float("-inf"))
        if self.mask is not None:
            mask = self.mask.expand(len(self.query), *[-1] * 3)[sequence] if self.mask.dim() == 4 else self.mask
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1).nan_to_num(0.0)

    def of_heads(self, shared: Tensor, sequence: int) -> Tensor:
        """Key or value of one sequence for every query head, ``[heads, T, d]`` float32."""
        mine, heads = shared[sequence].detach().float(), self.query.shape[1]
        return mine if len(mine) == heads else mine.repeat_interleave(heads // len(mine), 0)

    def fits(self, batch: Batch) -> bool:
        """Whether its queries and keys are the tokens of this batch."""
        count, length = batch.tokens.shape
        return self.query.dim() == 4 and len(self.query) == count and self.query.shape[2] == self.key.shape[2] == length


class _Watch(TorchFunctionMode):
    def __init__(self, calls: list[Attention]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        if function is ATTENTION:
            given = SIGNATURE.bind(*args, **(kwargs or {})).arguments
            query, scale = given["query"], given.get("scale")
            self.calls.append(
                Attention(
                    query,
                    given["key"],
                    given["value"],
                    given.get("attn_mask"),
                    bool(given.get("is_causal", False)),
                    query.shape[-1] ** -0.5 if scale is None else float(scale),
                    output,
                )
            )
        return output


@contextlib.contextmanager
def watching_attention(wanted: bool) -> Iterator[list[Attention]]:
    """The list that calls of attention are noted in, to be emptied by who reads it; empty if they are not wanted."""
    calls: list[Attention] = []
    with _Watch(calls) if wanted else contextlib.nullcontext():
        yield calls


def token_importance(calls: Sequence[Attention], batch: Batch) -> Tensor | None:
    """``u`` of every token, ``[sequences, T]`` in 0..1 with zeros at padding; None where no attention was seen."""
    mine = [call for call in calls if call.fits(batch)]
    if not mine:
        return None
    counted = batch.counted
    received = torch.zeros(batch.tokens.shape)
    for call in mine:
        for sequence, queries in enumerate(counted):
            received[sequence] += call.probabilities(sequence).cpu()[:, queries].sum((0, 1))
    return relative(received, counted)


def relative(received: Tensor, counted: Tensor) -> Tensor:
    """``received`` ``[sequences, T]`` mapped linearly to 0..1 over the counted tokens of each sequence."""
    low = received.masked_fill(~counted, float("inf")).amin(1, keepdim=True)
    high = received.masked_fill(~counted, float("-inf")).amax(1, keepdim=True)
    spread = high - low
    out = torch.where(spread > 0, (received - low) / spread.clamp(min=1e-30), torch.ones_like(received))
    return out.masked_fill(~counted, 0.0)
