"""Cutting to a trellis with error feedback: what ``_rounding`` does entry by entry, 32 rows of a column at a time.

A value of a trellis depends on the codes above it, so a strip of 32 rows is chosen as a whole, by the path of least
cost. The objective ``tr(R D C D^T)`` and the order of columns are those of ``_rounding``; along the rows the factor is
one of blocks, ``R = L D L^T`` with ``L`` the identity and ``D`` a whole matrix inside a strip,

    L[:, s] = L'[:, s] L'[s, s]^-1,      D[s, s] = L'[s, s] diag(d') L'[s, s]^T      (L', d' of the plain factor)

so that errors are absorbed by the columns and the strips still to come exactly as there. A path adds up costs of
single rows: in the first pass these are ``diag D``, and what lies beside the diagonal is left to the sweeps. A sweep
gives each strip of each column the path that is best around the present one, weighed with all of ``R``, and takes it
only where the loss falls.

Where rows do not act on each other, as in a table, each counts by its measured weight, much damped: a path can favour
some rows of its strip to the ruin of the others, and which entries other texts will look up calibration knows only in
part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics, diagonal
from layerwise.encoding.grid_loops import cut_tile, recut_tile
from layerwise.encoding.scales import by_group, places
from layerwise.encoding.trellis import STRIP
from layerwise.encoding.trellis_tables import UNIT, table
from layerwise.quantize._levels import DAMP, ROW_DAMP, Feedback
from layerwise.quantize._rounding import Side, blocks, check_statistics, damped_weights, factor, in_place

# Share of the mean weight added to that of a row that stands alone. A small vocabulary, all of which calibration meets,
# does best with about 1 and nearly as well with 4, a large one, little of which it meets, with much damping.
ALONE_DAMP = 4.0

# What a path leaves of a number of size x (see ``first_scales``): (plain, beyond), from normal numbers among which some
# of other sizes had been put.
LEFT = {1: (880, 0.7), 2: (177, 0.16), 3: (38, 0.065), 4: (9.5, 0.03), 5: (2, 0.015)}
PIECE = 1 << 17  # weights whose scales are tried together: as many as stay in the cache
SPREADS = tuple(step / 8 for step in range(13))  # powers of two by which the usual scale is widened


@dataclass(frozen=True, eq=False)
class Strips:
    """The factor of the rows' curvature in blocks of a strip.

    upper   float64 [m, m], L^T: the identity in each strip, zero below
    pivots  float64 [m], the diagonal of D
    """

    upper: Tensor
    pivots: Tensor

    @staticmethod
    def of(rows: Side) -> Strips:
        """``rows`` in their natural order."""
        upper, pivots = rows.upper.clone(), rows.pivots.clone()
        for top in range(0, len(pivots), STRIP):
            strip = slice(top, top + STRIP)
            own = rows.upper[strip, strip]
            upper[strip] = torch.linalg.solve_triangular(own, rows.upper[strip], upper=True)
            upper[strip, : top + STRIP] = 0
            pivots[strip] = (own.T**2 * rows.pivots[strip]).sum(1)
        upper.diagonal().fill_(1)
        return Strips(upper, pivots)


@dataclass(frozen=True, eq=False)
class Curvature:
    """Both sides of a site as the paths take them; ``rows`` is None where rows do not act on each other."""

    columns: Side | None
    rows: Side | None
    strips: Strips | None
    weights: Tensor  # float64 [m], of each row, their mean one

    @staticmethod
    def of(weight: Tensor, statistics: SiteStatistics, damp: float = DAMP, row_damp: float = ROW_DAMP) -> Curvature:
        check_statistics(weight, statistics)
        m, n = weight.shape
        side = statistics.columns
        columns = statistics.remembered(
            ("columns", damp, True), n, lambda: factor(side, damp, largest_first=True), source=side
        )
        rows = statistics.remembered(("rows", row_damp, False), m, lambda: factor(statistics.rows, row_damp))
        strips = None
        if rows is not None:
            strips = statistics.remembered(("strips", row_damp), m, lambda: Strips.of(rows))
        damped = damped_weights(statistics.rows, ALONE_DAMP if rows is None else row_damp)
        weights = damped / damped.mean()
        return Curvature(columns, rows, strips, weights)

    def importance(self, statistics: SiteStatistics) -> Tensor:
        """What an error of each column costs [n]."""
        return diagonal(statistics.columns) if self.columns is None else self.columns.importance()

    def feedback(self) -> Feedback:
        """The same for ``_levels.refit``."""
        return Feedback(self.columns, self.rows)


def first_scales(weight: Tensor, bits: int, group: int, importance: Tensor) -> Tensor:
    """Scales of the least error that a path is expected to leave: float32 [m, groups].

    The table is spread for normal numbers and ends at 127: where a group has longer tails, a scale that gives it the
    deviation of the table would cut them off. So some wider ones are tried against what a path leaves of a number
    ``x = |w| / s`` on average, ``s^2 (plain + beyond max(0, x - 55)^2 + max(0, x - 125)^2)``.
    """
    costs = by_group(importance.double().clamp(min=0), group)
    costs = (costs + 1e-9 * costs.mean() + 1e-300) * by_group(torch.ones(weight.shape[1]), group)
    costs = (costs / costs.sum(-1, keepdim=True)).float()
    pieces = weight.detach().split(max(1, PIECE // weight.shape[1]))
    return torch.cat([_scales(piece.float().abs(), bits, group, costs) for piece in pieces])


def _scales(sizes: Tensor, bits: int, group: int, costs: Tensor) -> Tensor:
    """The same for some rows; costs float32 [groups, width], of sum one in each group.

    A scale leaves ``plain s^2`` at least: groups where the next one reaches what is left by the best are done.
    """
    sizes = by_group(sizes, group)
    usual = (sizes.square() * costs).sum(-1).sqrt_().mul_(UNIT[bits])  # [m, groups]
    best, least = usual.flatten().clone(), _left(sizes, usual, bits, costs).flatten()
    for step in SPREADS[1:]:
        wider = usual.flatten() * 2.0**step
        open_ = torch.nonzero(LEFT[bits][0] * wider.square() < least).flatten()
        if not len(open_):
            break
        scales = wider[open_]
        error = _left(sizes.flatten(0, 1)[open_], scales, bits, costs[open_ % len(costs)])
        better = error < least[open_]
        best[open_[better]], least[open_[better]] = scales[better], error[better]
    return best.reshape(usual.shape)


def _left(sizes: Tensor, scales: Tensor, bits: int, costs: Tensor) -> Tensor:
    """What a path leaves of groups of ``sizes`` [..., width] with ``scales`` [...]."""
    plain, beyond = LEFT[bits]
    x = sizes / scales.clamp(min=1e-30)[..., None]
    end = (x - 125).clamp_(min=0).square_()
    left = x.sub_(55).clamp_(min=0).square_().mul_(beyond).add_(end)
    return left.mul_(costs).sum(-1).add_(plain).mul_(scales.square())


def cut(weight: Tensor, bits: int, group: int, scales: Tensor, curvature: Curvature, sweeps: int) -> Tensor:
    """States [m, n] uint8 of ``weight`` [m, n] after one pass and ``sweeps``; scales float32 [m, groups] as stored."""
    given = _given(weight, bits, group, scales, curvature)
    states, change = _cut(given, curvature)
    return _swept(given, curvature, states, change, sweeps)


def recut(
    weight: Tensor, bits: int, group: int, scales: Tensor, curvature: Curvature, sweeps: int, states: Tensor
) -> Tensor:
    """Given ``states`` [m, n] after further sweeps with scales that may have changed since: uint8 [m, n]."""
    given = _given(weight, bits, group, scales, curvature)
    part, stored, groups, values, _ = given
    order = _order(curvature, len(part))
    done = states.T[order].contiguous()
    points = (
        torch.from_numpy(values)[done.long()].double() * torch.from_numpy(stored)[torch.from_numpy(groups)].double()
    )
    return _swept(given, curvature, done, points - torch.from_numpy(part).double(), sweeps)


# ---------------------------------------------------------------- private


def _order(curvature: Curvature, columns: int) -> Tensor:
    return torch.arange(columns) if curvature.columns is None else curvature.columns.order


def _given(weight: Tensor, bits: int, group: int, scales: Tensor, curvature: Curvature) -> tuple[Any, ...]:
    """What the compiled loops take first: weights [n, m], scales [groups, m], groups [n], the table, its bits."""
    order = _order(curvature, weight.shape[1])
    part = weight.detach().float().T[order].contiguous().numpy()
    groups = places(group, weight.shape[1])[order].numpy()
    return part, scales.T.contiguous().numpy(), groups, table(bits).float().numpy(), bits


def _cut(given: tuple[Any, ...], curvature: Curvature) -> tuple[Tensor, Tensor]:
    """States and D = W' - W after one pass, both transposed [n, m]; a block of rows is whole strips."""
    n, m = given[0].shape
    columns, strips = curvature.columns, curvature.strips
    states, change = torch.empty((n, m), dtype=torch.uint8), torch.empty((n, m), dtype=torch.float64)
    pivots = curvature.weights if strips is None else strips.pivots
    nothing = np.empty((0, 0))
    for first, last in blocks(n):
        if columns is None:
            carried, own = torch.zeros(last - first, m, dtype=torch.float64), np.zeros((last - first, last - first))
        else:
            carried = columns.upper[first:last, last:] @ change[last:]  # [width, m]
            own = columns.lower[first:last, first:last].contiguous().numpy()
        absorbed = torch.empty_like(carried)
        for top, bottom in blocks(m):
            tile = (own, first, top, bottom - top, carried.numpy(), states.numpy(), change.numpy())
            costs = pivots[top:bottom].contiguous().numpy()
            if strips is None:
                cut_tile(*given, *tile, False, costs, nothing, nothing, nothing)
            else:
                below = (absorbed[:, bottom:] @ strips.upper[top:bottom, bottom:].T).contiguous()
                lower = strips.upper[top:bottom, top:bottom].T.contiguous().numpy()
                cut_tile(*given, *tile, True, costs, lower, below.numpy(), absorbed.numpy())
    return states, change


def _swept(given: tuple[Any, ...], curvature: Curvature, states: Tensor, change: Tensor, sweeps: int) -> Tensor:
    """``states`` [n, m] after the sweeps, in the weight's own order [m, n]."""
    n, m = states.shape
    columns, rows = curvature.columns, curvature.rows
    for _ in range(sweeps if columns is not None else 0):
        assert columns is not None
        for first, last in blocks(n):
            pull = columns.matrix[first:last] @ change  # [width, m]
            own = columns.matrix[first:last, first:last].contiguous().numpy()
            for top, bottom in blocks(m):
                if rows is None:
                    among = torch.diag(curvature.weights[top:bottom])
                    slope = pull[:, top:bottom] * curvature.weights[top:bottom]
                else:
                    among = rows.matrix[top:bottom, top:bottom].contiguous()
                    slope = pull @ rows.matrix[top:bottom].T  # [width, height]
                tile = (own, first, top, bottom - top, pull.numpy(), states.numpy(), change.numpy())
                recut_tile(*given, *tile, among.numpy(), slope.contiguous().numpy())
    return in_place(states, _order(curvature, n))
