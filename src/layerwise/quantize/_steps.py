"""Steps fitted to codes: the other half of rounding, once it is known which code every weight has.

With codes ``q`` and zeros ``z`` fixed, ``W' = s (q - z)`` is linear in the steps, and so ``tr(R D C D^T)`` is a
quadratic of each. With ``p = q - z`` on one group of one row i, and zero elsewhere,

    s <- s - (R D C)_i . p / (R_ii  p^T C p),

rounded to the stored type; it is taken where the trace falls, so it never rises. Rows go in tiles as the sweeps of
``_rounding`` take them; in a tile one group of columns after another, and in a group row by row. What a row's step does
to the others of its tile is known beforehand, ``R_ai (P C P^T)_ai``, so all that is left between matrix products is one
number a row.
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
    back = torch.argsort(columns.order)
    matrix = columns.matrix[back][:, back]  # C, a group's columns side by side
    # A stored step is a whole multiple of its row's factor, or an fp16 number where there is none.
    factor = torch.zeros(len(weight)) if fitted.factor is None else fitted.factor.float()
    pull = torch.empty(0) if rows is None else _change(weight, codes, fitted, order)[1] @ matrix  # D C
    steps, width = fitted.steps().double(), fitted.grid.width(fitted.columns)
    for top in range(0, len(order), BLOCK):
        tile = order[top : top + BLOCK]
        points, change = _change(weight, codes, fitted, tile)
        if rows is None:
            slope, among = change @ matrix, torch.eye(len(tile), dtype=torch.float64)
        else:
            slope = rows.matrix[top : top + BLOCK] @ pull  # R D C, up to date with the tiles before
            among = rows.matrix[top : top + BLOCK, top : top + BLOCK].contiguous()
        own = steps[tile]
        for group in range(own.shape[1]):
            cut = slice(group * width, (group + 1) * width)
            reach = points[:, cut] @ matrix[cut]  # P C [height, n]
            towards = (slope[:, cut] * points[:, cut]).sum(1)
            bend = reach[:, cut] @ points[:, cut].T  # P C P^T [height, height]
            before = own[:, group].clone()
            found = before.clone()
            fit_steps(found.numpy(), factor[tile].double().numpy(), among.numpy(), bend.numpy(), towards.numpy())
            moved = (found - before)[:, None] * reach
            later = moved[:, cut.stop :]  # groups before this one are done with
            slope[:, cut.stop :] += later if rows is None else among @ later
            if rows is not None:
                pull[top : top + BLOCK] += moved
            own[:, group] = found
        steps[tile] = own
    if fitted.factor is None:
        stored = steps.half()
    else:
        stored = (steps / factor.double()[:, None]).round().to(torch.uint8)
    return FittedGrid(fitted.grid, fitted.columns, stored, fitted.factor, fitted.zero)


def _change(weight: Tensor, codes: Tensor, fitted: FittedGrid, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(code - zero, W' - W) of some rows: float64 [chosen, n]."""
    groups = group_of(weight.shape[1], fitted.grid)
    points = codes[chosen].double() - fitted.zeros()[chosen].double()[:, groups]
    return points, fitted.steps()[chosen].double()[:, groups] * points - weight[chosen].double()
