"""Damage: the predicted rise of the loss when a stored matrix changes.

    damage(D) = sum over uses of  scale * tr(R D C D^T)          D = W' - W, [rows, columns]

R and C are second moments (``calibrate/statistics.py``); the unit is the loss's own, so damages of different sites
and techniques can be compared and added. Zero for no change, quadratic in the size of the change.
"""

from __future__ import annotations

from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics

CHUNK_ROWS = 8192


def damage(change: Tensor, statistics: SiteStatistics) -> float:
    """Predicted rise of the loss for ``change`` ``[rows, columns]``; never negative.

    A diagonal row side is summed in chunks of rows, so a table of any length needs little memory.
    """
    total = 0.0
    for use in statistics.uses:
        if use.rows.dim() == 1:
            part = 0.0
            for start in range(0, change.shape[0], CHUNK_ROWS):
                piece = change[start : start + CHUNK_ROWS]
                quadratic = (_times_columns(piece, use.columns) * piece).sum(1)  # [rows]
                part += float((quadratic * use.rows[start : start + CHUNK_ROWS]).double().sum())
        else:
            part = float(((use.rows @ change) * _times_columns(change, use.columns)).double().sum())
        total += use.scale * part
    return max(0.0, total)


def _times_columns(change: Tensor, columns: Tensor) -> Tensor:
    return change * columns if columns.dim() == 1 else change @ columns
