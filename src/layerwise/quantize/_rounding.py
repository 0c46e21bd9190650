"""Rounding with error feedback: the part that one-sided and two-sided rounding share.

A weight ``W`` [m, n] gets codes entry by entry, last column first and in a column last row first. With
``D = W' - W`` on the entries already rounded, and unit lower triangular factors of the two curvatures,

    C = L_columns D_columns L_columns^T  (n x n),      R = L_rows D_rows L_rows^T  (m x m),

the entry (i, j) is rounded at

    t_ij = W_ij - sum_{l > j} D_il L_columns[l, j] - sum_{k > i} L_rows[k, i] c_kj,
    c_kj = sum_{l >= j} D_kl L_columns[l, j].

Then ``U = L_rows^T D L_columns`` holds just the rounding errors ``W'_ij - t_ij``, and
``tr(R D C D^T) = sum_ij d_rows,i d_columns,j U_ij^2``: no error but each entry's own rounding is left in the objective.
Without rows (``L_rows = I``) this is the feedback of GPTQ in its LDLQ form.

One pass sees each entry once, before it is known how the later ones turn out. A *sweep* visits them again and gives
each the code that is best while all others stay,

    t_ij = W'_ij - (R D C)_ij / (R_ii C_jj),

so that ``tr(R D C D^T)`` falls or stays with every step.

Only tiles of ``block x block`` are rounded entry by entry (compiled, in ``encoding.loops``); what lies outside a tile
is two matrix products. Sums are float64, so the size of a block changes a code of the first pass only where a target
lies within about 1e-15 of a tie; weights and codes are float32 and uint8. A sweep over both sides goes tile by tile,
every entry acting on every other, so there the size of a tile is part of the definition: it is ``BLOCK``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerwise.calibrate.statistics import Shared, SiteStatistics, diagonal
from layerwise.encoding.finite import all_finite
from layerwise.encoding.grid import FittedGrid, Grid, fit_grid, group_of, round_to_grid, row_pieces
from layerwise.encoding.grid_loops import round_columns
from layerwise.encoding.integer import GroupedInteger
from layerwise.errors import InputError

BLOCK = 64
GATHERED = 128  # rows of a side that are put into order at a time
log = logging.getLogger(__name__)


def check_statistics(weight: Tensor, statistics: SiteStatistics) -> None:
    """Refuse statistics of another shape, or not finite."""
    sides = (("row", statistics.rows), ("column", statistics.columns))
    for (name, side), size in zip(sides, weight.shape, strict=True):
        if tuple(side.shape) not in ((size,), (size, size)):
            raise InputError(f"the {name} statistics of a {list(weight.shape)} weight have shape {list(side.shape)}")
        if not all_finite(side):
            raise InputError(f"the {name} statistics of a {list(weight.shape)} weight are not finite")


@dataclass(frozen=True, eq=False)
class Side:
    """One curvature, damped and factored, in the order of rounding (the last is rounded first).

    order   int64 [n]
    matrix  float64 [n, n], over its mean diagonal; empty where no sweeps need it
    upper   float64 [n, n], unit upper triangular. It is kept, and not the lower one, because the products outside a
            tile then read whole rows, which is twice as fast as columns.
    pivots  float64 [n], so that matrix = upper^T diag(pivots) upper
    """

    order: Tensor
    matrix: Tensor
    upper: Tensor
    pivots: Tensor

    @property
    def lower(self) -> Tensor:
        """L of the formulas above: a view."""
        return self.upper.T

    def importance(self) -> Tensor:
        """What an own rounding error of each column costs once the others have absorbed what they can: float32 [n]."""
        return torch.empty(len(self.order)).index_copy_(0, self.order, self.pivots.float())


def factor(
    side: Tensor,
    damp: float,
    *,
    largest_first: bool = False,
    reverse: bool = False,
    order: Tensor | None = None,
    sweeps: bool = True,
) -> Side | None:
    """``side + damp * mean(diag) I`` factored; its rows taken last to first, or in an ``order``, or as the flags say.

    sweeps: whether the matrix itself is wanted; without it a wide side takes a third less memory.

    None where there is nothing to feed back: a side stored as its diagonal, or one without any curvature. Damping
    rises tenfold until the factorisation succeeds, as it must for a singular side when ``damp`` is 0.
    """
    squares = diagonal(side)
    mean = float(squares.double().clamp(min=0).mean())
    if side.dim() == 1 or not mean > 0:
        return None
    if order is None:
        order = torch.argsort(squares, stable=True) if largest_first else torch.arange(len(side))
    if reverse:
        order = order.flip(0)
    share = damp
    for _ in range(20):
        matrix = _ordered(side, order, mean)
        matrix.diagonal().add_(share)
        # In place, unless the matrix is wanted too: lower in column order is the same memory as upper in row order.
        upper = matrix.clone() if sweeps else matrix
        failed = torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(upper.T, out=(upper.T, failed))
        if not int(failed) and all_finite(upper):
            root = upper.diagonal().clone()
            return Side(order, matrix if sweeps else matrix.new_empty(0), upper.div_(root[:, None]), root**2)
        share = max(share * 10, 1e-8)
        log.info("a curvature of %d columns is not positive: damping raised to %g", len(side), share)
    return None


def _ordered(side: Tensor, order: Tensor, mean: float) -> Tensor:
    """``side`` over its mean diagonal with rows and columns in this order: float64, a few rows at a time."""
    matrix = torch.empty(side.shape, dtype=torch.float64)
    for start in range(0, len(order), GATHERED):
        rows = side.index_select(0, order[start : start + GATHERED])
        matrix[start : start + GATHERED] = rows.index_select(1, order)
    return matrix.div_(mean)


def round_with_feedback(
    weight: Tensor, fitted: FittedGrid, columns: Side, rows: Side | None = None, *, sweeps: int = 0, block: int = BLOCK
) -> Tensor:
    """Codes [m, n] uint8 of ``weight`` [m, n] on a grid fitted beforehand, revised by ``sweeps``."""
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for chosen, grid in _pieces(weight, fitted, columns, rows):
        done, change = _round(grid, columns, rows, block)
        for _ in range(sweeps):
            _revise(grid, columns, rows, block, done, change)
        codes[chosen] = in_place(done, columns.order)
    return codes


def one_sided(
    weight: Tensor,
    moment: Tensor,
    grid: Grid,
    *,
    clip: bool,
    damp: float,
    act_order: bool,
    shared: Shared | None = None,
) -> GroupedInteger:
    """``weight`` [m, n] rounded against ``tr(D H D^T)``, H being ``moment`` [n, n]; to nearest if it is a diagonal [n].

    Grids are fitted to the weight as it is. The columns of the largest inputs are rounded first (``act_order``), or all
    from the first to the last.

    shared: what the site has in common with others; their factor is its own if it is made of the very same moment.
    """
    fitted = fit_grid(weight, grid, clip=clip, importance=diagonal(moment))

    def factored() -> Side | None:
        return factor(moment, damp, largest_first=act_order, reverse=not act_order, sweeps=False)

    if shared is not None and shared.source is moment:
        columns = shared.remembered(("one-sided", damp, act_order), factored)
    else:
        columns = factored()
    if columns is None:
        return GroupedInteger.from_codes(round_to_grid(weight, fitted), fitted)
    return GroupedInteger.from_codes(round_with_feedback(weight, fitted, columns), fitted)


def revised(weight: Tensor, codes: Tensor, fitted: FittedGrid, columns: Side, rows: Side | None, sweeps: int) -> Tensor:
    """Given codes [m, n] after further sweeps on a grid that may have changed since: uint8 [m, n]."""
    out = torch.empty_like(codes)
    for chosen, grid in _pieces(weight, fitted, columns, rows):
        done = codes[chosen][:, columns.order].T.contiguous()
        part, steps, zeros, groups, _ = (torch.as_tensor(t) for t in grid)
        change = (steps[groups] * (done.float() - zeros[groups])).double() - part.double()
        for _ in range(sweeps):
            _revise(grid, columns, rows, BLOCK, done, change)
        out[chosen] = in_place(done, columns.order)
    return out


def damped_weights(rows: Tensor, damp: float) -> Tensor:
    """What each row counts where rows stand alone: its share of the mean weight, plus ``damp``: float64 [m]."""
    own = diagonal(rows).double().clamp(min=0)
    mean = float(own.mean())
    return (own / mean if mean > 0 else torch.ones_like(own)) + damp


def in_place(done: Tensor, order: Tensor) -> Tensor:
    """Codes [n, m] in the order of rounding -> [m, n], every column in its own place."""
    return torch.empty_like(done).index_copy_(0, order, done).T.contiguous()


def _pieces(weight: Tensor, fitted: FittedGrid, columns: Side, rows: Side | None) -> Iterator[tuple[Tensor, Any]]:
    """(rows, what the compiled loops need of them: weights [n, m], steps and zeros [groups, m], groups, top code)."""
    groups = group_of(weight.shape[1], fitted.grid)[columns.order]
    if rows is not None:
        pieces = [rows.order]
    else:  # rows that do not feed each other can be rounded in pieces, which bounds the float64 memory
        pieces = [torch.arange(p.start, p.stop) for p in row_pieces(*weight.shape)]
    for chosen in pieces:
        # Whole rows are put into order, after the transposition: single entries would be fetched one by one.
        part = weight.detach().index_select(0, chosen).float().T.contiguous().index_select(0, columns.order)  # [n, m]
        steps, zeros = (t[chosen].T.contiguous() for t in (fitted.steps(), fitted.zeros()))  # [groups, m]
        yield chosen, (part.numpy(), steps.numpy(), zeros.numpy(), groups.numpy(), float(fitted.grid.top))


def _round(grid: Any, columns: Side, rows: Side | None, block: int) -> tuple[Tensor, Tensor]:
    """Codes and D = W' - W, both transposed [n, m], tile by tile."""
    shape = grid[0].shape
    codes, change = torch.empty(shape, dtype=torch.uint8), torch.empty(shape, dtype=torch.float64)
    for first, last in blocks(shape[0], block):
        carried = columns.upper[first:last, last:] @ change[last:]  # [width, m]
        own = _tile(columns, first, last)
        absorbed = torch.empty_like(carried)
        for top, bottom in blocks(shape[1], block):
            tile = (own, first, top, bottom - top, carried.numpy(), codes.numpy(), change.numpy())
            if rows is None:
                round_columns(*grid, *tile)
            else:
                from layerwise.encoding.loops import round_tile

                below = absorbed[:, bottom:] @ rows.upper[top:bottom, bottom:].T  # [width, height]
                round_tile(*grid, *tile, _tile(rows, top, bottom), below.numpy(), absorbed.numpy())
    return codes, change


def _revise(grid: Any, columns: Side, rows: Side | None, block: int, codes: Tensor, change: Tensor) -> None:
    """One sweep over all entries; ``codes`` and ``change`` [n, m] are updated in place."""
    from layerwise.encoding.loops import revise_columns, revise_tile

    for first, last in blocks(change.shape[0], block):
        pull = columns.matrix[first:last] @ change  # [width, m]
        own = columns.matrix[first:last, first:last].contiguous().numpy()
        for top, bottom in blocks(change.shape[1], block):
            tile = (own, first, top, bottom - top, pull.numpy(), codes.numpy(), change.numpy())
            if rows is None:
                revise_columns(*grid, *tile)
            else:
                slope = pull @ rows.matrix[top:bottom].T  # [width, height]; R is symmetric
                revise_tile(*grid, *tile, rows.matrix[top:bottom, top:bottom].contiguous().numpy(), slope.numpy())


def _tile(side: Side, first: int, last: int) -> Any:
    """The lower factor between the entries of one tile, as an array."""
    return side.lower[first:last, first:last].contiguous().numpy()


def blocks(size: int, block: int = BLOCK) -> Iterator[tuple[int, int]]:
    """Bounds of each block, the last block first; blocks are cut from the start."""
    for first in range((size - 1) // block * block, -1, -block):
        yield first, min(first + block, size)
