"""Steps fitted to codes: the other half of rounding, once it is known which code every weight has.

With codes ``q`` and zeros ``z`` fixed, ``W' = s (q - z)`` is linear in the steps, and so ``tr(R D C D^T)`` is a
quadratic of each. With ``p = q - z`` on one group of one row i, and zero elsewhere,

    s <- s - (R D C)_i . p / (R_ii  p^T C p),

rounded to the stored type; it is taken where the trace falls, so it never rises. One group after another, a row's
groups first; rows in tiles as the sweeps of ``_rounding`` take them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.encoding.grid import FittedGrid, group_of
from layerwise.quantize._rounding import BLOCK, Side


def refit_steps(weight: Tensor, codes: Tensor, fitted: FittedGrid, columns: Side, rows: Side | None) -> FittedGrid:
    """The grid with steps that suit ``codes`` [m, n]; zeros, and the rows' factors of 8-bit scales, stay.

    Without ``rows`` each row stands alone: R = I.
    """
    from layerwise.encoding.loops import fit_steps

    order = torch.arange(len(weight)) if rows is None else rows.order
    groups = group_of(weight.shape[1], fitted.grid)[columns.order]
    # A stored step is a whole multiple of its row's factor, or an fp16 number where there is none.
    factor = torch.zeros(len(weight)) if fitted.factor is None else fitted.factor.float()
    pull = torch.empty(0) if rows is None else _change(weight, codes, fitted, columns, order)[1] @ columns.matrix
    steps = fitted.steps().double()
    for top in range(0, len(order), BLOCK):
        tile = order[top : top + BLOCK]
        points, change = _change(weight, codes, fitted, columns, tile)
        own = steps[tile].contiguous()
        if rows is None:
            pulled, among = change @ columns.matrix, torch.eye(len(tile), dtype=torch.float64)
            slope = pulled.clone()
        else:
            pulled, among = pull[top : top + BLOCK], rows.matrix[top : top + BLOCK, top : top + BLOCK].contiguous()
            slope = rows.matrix[top : top + BLOCK] @ pull
        fit_steps(
            points.numpy(), own.numpy(), groups.numpy(), factor[tile].double().numpy(), columns.matrix.numpy(),
            among.numpy(), slope.numpy(), pulled.numpy(),
        )  # fmt: skip
        steps[tile] = own
    if fitted.factor is None:
        stored = steps.half()
    else:
        stored = (steps / factor.double()[:, None]).round().to(torch.uint8)
    return FittedGrid(fitted.grid, fitted.columns, stored, fitted.factor, fitted.zero)


def _change(weight: Tensor, codes: Tensor, fitted: FittedGrid, columns: Side, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(code - zero, W' - W) of some rows, columns in the order of rounding: float64 [chosen, n]."""
    groups = group_of(weight.shape[1], fitted.grid)[columns.order]
    points = codes[chosen][:, columns.order].double() - fitted.zeros()[chosen].double()[:, groups]
    change = fitted.steps()[chosen].double()[:, groups] * points
    return points, change - weight[chosen][:, columns.order].double()
