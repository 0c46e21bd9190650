"""Rounding to levels that lie on no even grid, to the nearest or with error feedback.

What ``_rounding`` does for even grids, for any ascending levels per row and group: the same objective
``tr(R D C D^T)``, the same order (largest curvature first, last column and row first), the same sweeps; only the
choice of a code is another, the nearest of a few numbers. Two levels are binary, three ternary, nine two trit planes.
Techniques whose papers round to nearest take the feedback as an option: it is ours.

Once codes stand, the scales are free again: ``tr(R D C D^T)`` is quadratic in them, and where all rows have one scale
each, ``W' = diag(a) T``, its minimum solves ``(R o (T C T^T)) a = ((R W C) o T) 1``. ``refit`` takes that step for one
group of columns at a time; codes and scales then take turns. On ``examples/docs-lm`` four turns took 9 % of the
predicted damage off ternary linears, 23 % off binary ones and 3 % off two trit planes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics, diagonal
from layerwise.encoding.grid import row_pieces
from layerwise.encoding.scales import width_of
from layerwise.quantize._rounding import Side, blocks, check_statistics, factor

DAMP = 0.01  # share of mean(diag C) added to C, as in TWO-SIDED
ROW_DAMP = 0.5  # share of mean(diag R) added to R
SWEEPS = 4  # revisions of the codes after the first pass and after each refit
REFITS = 4  # times that scales are refitted to their codes, and codes revised to their scales
MOST_WORK = 10**11  # multiplications of one refit beyond which scales stay as they were found


@dataclass(frozen=True, eq=False)
class Basis:
    """What one column of scales multiplies: ``values`` [m, w] float64 at the columns ``columns``, zero elsewhere."""

    columns: slice
    values: Tensor


@dataclass(frozen=True, eq=False)
class Feedback:
    """The factored curvatures of a site; ``columns`` is None where there is nothing to feed back."""

    columns: Side | None
    rows: Side | None

    @staticmethod
    def of(weight: Tensor, statistics: SiteStatistics, wanted: bool) -> Feedback:
        """Factors of both sides, shared by all candidates of the site; neither if not ``wanted``."""
        check_statistics(weight, statistics)
        if not wanted:
            return Feedback(None, None)
        m, n = weight.shape
        side = statistics.columns
        columns = statistics.remembered(
            ("columns", DAMP, True), n, lambda: factor(side, DAMP, largest_first=True), source=side
        )
        if columns is None:
            return Feedback(None, None)
        rows = statistics.remembered(
            ("rows", ROW_DAMP, True), m, lambda: factor(statistics.rows, ROW_DAMP, largest_first=True)
        )
        return Feedback(columns, rows)

    def importance(self, statistics: SiteStatistics) -> Tensor:
        """What an error of each column costs [n]: its own share under feedback, else the inputs' mean squares."""
        return diagonal(statistics.inputs) if self.columns is None else self.columns.importance()


def place(
    weight: Tensor,
    levels: Tensor,
    groups: Tensor,
    feedback: Feedback,
    sweeps: int = SWEEPS,
    start: Tensor | None = None,
) -> Tensor:
    """Places among the levels: uint8 [m, n].

    weight [m, n]; levels [m, G, L] float32 ascending, places that do not exist being +infinity; groups int64 [n], the
    row of ``levels`` that each column uses. With ``start`` [m, n] there is no first pass: its places are revised.
    """
    from layerwise.encoding.level_loops import nearest_places

    codes = torch.empty(weight.shape, dtype=torch.uint8)
    if feedback.columns is None:
        for rows in row_pieces(*weight.shape):
            values = weight[rows].detach().float().contiguous().numpy()
            nearest_places(values, levels[rows].contiguous().numpy(), groups.numpy(), codes[rows].numpy())
        return codes
    order, columns, rows_side = feedback.columns.order, feedback.columns, feedback.rows
    pieces = [torch.arange(p.start, p.stop) for p in row_pieces(*weight.shape)]
    if rows_side is not None:
        pieces = [rows_side.order]
    for chosen in pieces:
        part = weight[chosen].detach().float().T[order].contiguous()  # [n, m]
        table = levels[chosen].transpose(0, 1).contiguous()  # [G, m, L]
        grid = (part.numpy(), table.numpy(), groups[order].numpy())
        if start is None:
            done, change = _place(grid, columns, rows_side)
        else:
            done = start[chosen].T[order].contiguous()
            change = _values(table, groups[order], done).double() - part
        for _ in range(sweeps):
            _move(grid, columns, rows_side, done, change)
        codes[chosen[:, None], order] = done.T
    return codes


def rescaled(feedback: Feedback, factors: Tensor) -> Feedback:
    """The same site seen through columns divided by ``factors`` [n]: ``C_jk f_j f_k``, factored again."""
    if feedback.columns is None:
        return feedback
    side = feedback.columns
    f = factors[side.order].double()
    matrix = side.matrix * f[:, None] * f
    upper = side.upper * f  # f scales whole columns of U; dividing each row by its own makes it unit again
    root = upper.diagonal().clone()
    columns = Side(side.order, matrix, (upper / root[:, None]).contiguous(), side.pivots * root**2)
    return Feedback(columns, feedback.rows)


def bases_of(planes: Tensor, group: int) -> list[Basis]:
    """``planes`` [m, P, n] cut into groups of columns, plane by plane, in the order of a form's scales."""
    n, width = planes.shape[2], width_of(group, planes.shape[2])
    cuts = [slice(first, min(first + width, n)) for first in range(0, n, width)]
    return [Basis(cut, planes[:, p, cut].double()) for p in range(planes.shape[1]) for cut in cuts]


def refit(weight: Tensor, bases: Sequence[Basis], scales: Tensor, feedback: Feedback) -> Tensor:
    """Scales of less loss for the same codes: float32 [m, Q]. ``W' = sum_q scales[:, q] * bases[q]``.

    One round of block coordinate descent on ``tr(R D C D^T)``: the scales of one basis move in all rows at once, to
    where ``(R o (T C T^T)) delta = - (R D C o T) 1`` puts them. Given back unchanged where that is too much work.
    """
    columns, rows = feedback.columns, feedback.rows
    m, n = weight.shape
    if columns is None or len(bases) * m * m * n > MOST_WORK:
        return scales
    c = _in_place(columns)
    r = None if rows is None else _in_place(rows)
    scales, change = scales.double().clone(), -weight.detach().double()
    for q, basis in enumerate(bases):
        change[:, basis.columns] += scales[:, q, None] * basis.values
    pull = change @ c if r is None else r @ change @ c  # R D C, kept up to date
    for q, basis in enumerate(bases):
        seen = basis.values @ c[basis.columns]  # T C [m, n]
        slope = (pull[:, basis.columns] * basis.values).sum(1)
        if r is None:
            own = (seen[:, basis.columns] * basis.values).sum(1)
            delta = torch.where(own > 0, -slope / own.clamp(min=1e-300), torch.zeros_like(own))
            pull += delta[:, None] * seen
        else:
            system = r * (seen[:, basis.columns] @ basis.values.T)
            system.diagonal().add_(1e-9 * float(system.diagonal().mean()) + 1e-300)
            factored, failed = torch.linalg.cholesky_ex(system)
            if int(failed):
                continue
            delta = -torch.cholesky_solve(slope[:, None], factored)[:, 0]
            pull += r @ (delta[:, None] * seen)
        scales[:, q] += delta
    return scales.float()


# ---------------------------------------------------------------- private


def _in_place(side: Side) -> Tensor:
    """The damped curvature in the weight's own order: float64 [n, n]."""
    back = torch.argsort(side.order)
    return side.matrix[back][:, back]


def _values(table: Tensor, groups: Tensor, codes: Tensor) -> Tensor:
    """The levels at ``codes`` [n, m] of ``table`` [G, m, L]: float32 [n, m]."""
    m, count = table.shape[1:]
    return table.view(-1)[(groups[:, None] * m + torch.arange(m)) * count + codes]


def _place(grid: Any, columns: Side, rows: Side | None) -> tuple[Tensor, Tensor]:
    """Codes and D = W' - W after one pass, both transposed [n, m]."""
    from layerwise.encoding.level_loops import place_tile

    n, m = grid[0].shape
    codes, change = torch.empty((n, m), dtype=torch.uint8), torch.empty((n, m), dtype=torch.float64)
    nothing = np.empty((0, 0))
    for first, last in blocks(n):
        carried = columns.upper[first:last, last:] @ change[last:]  # [width, m]
        own = columns.lower[first:last, first:last].contiguous().numpy()
        absorbed = torch.empty_like(carried)
        for top, bottom in blocks(m):
            tile = (own, first, top, bottom - top, carried.numpy(), codes.numpy(), change.numpy())
            if rows is None:
                place_tile(*grid, *tile, False, nothing, nothing, nothing)
            else:
                below = (absorbed[:, bottom:] @ rows.upper[top:bottom, bottom:].T).contiguous()
                lower = rows.lower[top:bottom, top:bottom].contiguous().numpy()
                place_tile(*grid, *tile, True, lower, below.numpy(), absorbed.numpy())
    return codes, change


def _move(grid: Any, columns: Side, rows: Side | None, codes: Tensor, change: Tensor) -> None:
    """One sweep over all entries; ``codes`` and ``change`` [n, m] are updated in place."""
    from layerwise.encoding.level_loops import move_tile

    n, m = change.shape
    nothing = np.empty((0, 0))
    for first, last in blocks(n):
        pull = columns.matrix[first:last] @ change  # [width, m]
        own = columns.matrix[first:last, first:last].contiguous().numpy()
        for top, bottom in blocks(m):
            tile = (own, first, top, bottom - top, pull.numpy(), codes.numpy(), change.numpy())
            if rows is None:
                move_tile(*grid, *tile, False, nothing, nothing)
            else:
                slope = (pull @ rows.matrix[top:bottom].T).contiguous()  # [width, height]
                matrix = rows.matrix[top:bottom, top:bottom].contiguous().numpy()
                move_tile(*grid, *tile, True, matrix, slope.numpy())
