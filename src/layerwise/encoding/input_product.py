"""The product of quantized inputs with a weight of whole numbers, as a kernel must give it.

With ``x' = s (q - z)`` and ``w = t (p - o)`` the sum over columns that share ``s`` and ``t`` is

    s t sum_j (q_j - z) (p_j - o),        whole numbers below 2^53, which float64 adds without rounding

so scales meet finished sums only: one partial sum for each group of weights, split further where groups of channels
have scales of their own. ``PackedLinear`` multiplies the same values in the network's own type until then; the two
differ by float rounding alone (tested).
"""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.encoding.grid import group_of
from layerwise.encoding.inputs import Quantized
from layerwise.encoding.integer import GroupedInteger
from layerwise.errors import InputError


def input_product(inputs: Quantized, weight: GroupedInteger) -> Tensor:
    """``x' W^T`` ``[..., rows]`` float64. Refuses weights whose zero points are no whole numbers."""
    fitted = weight.fitted
    if weight.grid.float_zero:
        raise InputError("an integer product needs weights whose zero points are whole numbers")
    codes = (inputs.codes if inputs.zero is None else inputs.codes - inputs.zero).double()
    of_column = group_of(fitted.columns, weight.grid)
    whole = weight.codes().double() - fitted.zeros().double()[:, of_column]
    steps = fitted.steps().double()
    by_token = inputs.scale.shape[-1] == 1 and inputs.scale.dim() == codes.dim()
    scales = torch.ones(fitted.columns).double() if by_token else inputs.scale.double()
    out = torch.zeros(*codes.shape[:-1], weight.shape[0], dtype=torch.float64)
    for group in range(steps.shape[1]):
        inside = of_column == group
        for scale in scales[inside].unique():
            columns = inside & (scales == scale)
            out += scale * (codes[..., columns] @ whole[:, columns].T) * steps[:, group]
    return out * inputs.scale.double() if by_token else out
