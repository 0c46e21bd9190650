"""Damage: the predicted rise of the loss when a stored matrix changes.

    damage(D) = sum over uses of  scale * tr(R D C D^T)          D = W' - W, [rows, columns]

R and C are second moments (``calibrate/statistics.py``); the unit is the loss's own, so damages of different sites
and techniques can be compared and added. Zero for no change, quadratic in the size of the change.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics

CHUNK_ROWS = 8192  # that are summed together
ROWS_AT_ONCE = 1024  # of these that are in memory together


def damage(change: Tensor, statistics: SiteStatistics) -> float:
    """Predicted rise of the loss for ``change`` ``[rows, columns]``; never negative.

    Where both sides are diagonals, as a table's are, few rows are in memory at a time.
    """
    return damage_of_rows(lambda start, stop: change[start:stop], change.shape[0], statistics)


def damage_of_rows(change: Callable[[int, int], Tensor], rows: int, statistics: SiteStatistics) -> float:
    """``damage`` of a change that is given a range of rows at a time, all of them if a row side is a matrix."""
    uses = statistics.uses
    step = ROWS_AT_ONCE if all(use.columns.dim() == 1 for use in uses) else CHUNK_ROWS
    step = step if all(use.rows.dim() == 1 for use in uses) else rows
    parts = [0.0] * len(uses)
    quadratics: list[list[Tensor]] = [[] for _ in uses]  # of the rows of a chunk
    for start in range(0, rows, step):
        piece = change(start, min(start + step, rows))
        for k, use in enumerate(uses):
            if use.rows.dim() == 1:
                quadratics[k] += [(_times_columns(p, use.columns) * p).sum(1) for p in piece.split(CHUNK_ROWS)]
            else:
                parts[k] += float(((use.rows @ piece) * _times_columns(piece, use.columns)).double().sum())
    for k, use in enumerate(uses):
        if quadratics[k]:
            weighed = torch.cat(quadratics[k]) * use.rows
            parts[k] = sum(float(chunk.double().sum()) for chunk in weighed.split(CHUNK_ROWS))
    return max(0.0, sum(use.scale * part for use, part in zip(uses, parts, strict=True)))


def _times_columns(change: Tensor, columns: Tensor) -> Tensor:
    return change * columns if columns.dim() == 1 else change @ columns
