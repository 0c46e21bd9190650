"""Which rows of a linear's inputs and gradients are tokens, and to which text of the batch they belong."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.network.streaming import Batch


def counted_rows(values: Tensor, batch: Batch, routed: Tensor | None = None) -> Tensor:
    """``[tokens, n]`` of ``[sequences, length, n]`` without padding; values with one row a text are kept whole."""
    if routed is not None:
        return values if batch.mask is None else values[batch.counted.to(values.device).flatten()[routed]]
    if values.dim() == 3 and values.shape[:2] == batch.tokens.shape and batch.mask is not None:
        return values[batch.counted.to(values.device)]
    return values.reshape(-1, values.shape[-1])


def by_example(values: Tensor, batch: Batch, tokens_alone: bool, routed: Tensor | None = None) -> Tensor:
    """``[examples, T, n]`` with zeros at padding, so that padding never counts; one row a text becomes ``T = 1``.

    tokens_alone: every token is an example. Where each token has a loss term of its own the errors of different
    tokens hardly meet in one term, and single tokens are many more samples than windows.
    routed: rows that an expert was sent go back to their places in the batch, with zeros at all others.
    """
    if routed is not None:
        if tokens_alone:
            return counted_rows(values, batch, routed).unsqueeze(1)
        spread = values.new_zeros(batch.tokens.numel(), values.shape[-1]).index_copy(0, routed, values)
        return spread.view(*batch.tokens.shape, -1) * batch.counted.to(values.device).unsqueeze(-1)
    if values.dim() == 2:
        return values.unsqueeze(1)
    if tokens_alone:
        return counted_rows(values, batch).unsqueeze(1)
    if batch.mask is None or values.shape[:2] != batch.tokens.shape:
        return values
    return values * batch.counted.to(values.device).unsqueeze(-1)


def importance_of_rows(importance: Tensor | None, given: Tensor, batch: Batch, routed: Tensor | None) -> Tensor | None:
    """The importance of the rows that ``counted_rows`` takes of ``given``; 1 for rows that are no tokens."""
    if importance is None:
        return None
    if routed is not None:
        return counted_rows(importance.flatten()[routed.cpu(), None], batch, routed.cpu()).flatten()
    if given.dim() == 3 and given.shape[:2] == batch.tokens.shape:
        return counted_rows(importance.unsqueeze(-1), batch).flatten()
    return torch.ones(given.numel() // given.shape[-1])
