"""Attention with its maps in the open, so that a method can change them between softmax and values.

    A = softmax(q k^T scale + mask)  [rows, heads, count, end]   ─ edit(block, A) ─→   A' v

While an edit is active (``edited``) the network's attention modules call the function below in the place of their fused
kernel; afterwards everything is as before. Which blocks are changed is the edit's business; the others compute the same
numbers up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from layerwise.generate.network import CausalNetwork

Edit = Callable[[int, Tensor], Tensor]
"""(block, maps [rows, heads, count, end]) -> maps of the same shape, whose rows sum to one."""

NAME = "layerwise_edited"
_ACTIVE: ContextVar[Edit] = ContextVar("layerwise_edit")


@contextmanager
def edited(network: CausalNetwork, edit: Edit) -> Iterator[None]:
    """Within this, ``edit`` changes the attention maps of every block."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    config: Any = network.module.config
    usual, token = config._attn_implementation, _ACTIVE.set(edit)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = usual
        _ACTIVE.reset(token)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """As transformers calls attention: ``[rows, heads, count, width]`` in, ``[rows, count, heads, width]`` out."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    count, end = scores.shape[-2:]
    if attention_mask is None:  # the queries are the last positions
        attention_mask = torch.ones(count, end, dtype=torch.bool, device=query.device).tril(end - count)
    exact = torch.promote_types(query.dtype, torch.float32)
    maps = scores.to(exact).masked_fill(~attention_mask, float("-inf")).softmax(-1)
    maps = _ACTIVE.get()(module.layer_idx, maps)
    return (maps.to(query.dtype) @ value).transpose(1, 2).contiguous(), None
