"""Choosing what to keep by score: the part that every pruning technique shares.

Of n entries a share ``sparsity`` goes, ``floor(sparsity n + 1/2)`` but never all: n the entries of a row (``row``), of
the matrix (``matrix``), or two of every four columns (``2:4``). Equal scores keep the entry further left (in a matrix:
in the earlier row), so counts are exact, and what a higher sparsity keeps, a lower one keeps too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from layerwise.encoding.grid import row_pieces
from layerwise.encoding.positions import fours, kept_of_fours
from layerwise.errors import InputError


def pruned_of(entries: int, sparsity: float) -> int:
    """How many of ``entries`` go."""
    return min(math.floor(sparsity * entries + 0.5), entries - 1)


def kept_count(rows: int, columns: int, sparsity: float, pattern: str) -> int:
    """Entries that a matrix of this shape keeps."""
    if pattern == "2:4":
        return rows * kept_of_fours(columns)
    if pattern == "matrix":
        return rows * columns - pruned_of(rows * columns, sparsity)
    return rows * (columns - pruned_of(columns, sparsity))


def best_entries(score: Tensor, sparsity: float, pattern: str) -> Tensor:
    """Mask of the entries with the highest ``score`` [rows, columns], not negative: bool, same shape."""
    rows, columns = score.shape
    if pattern == "matrix":
        flat = score.reshape(1, -1)
        return largest(flat, flat.shape[1] - pruned_of(flat.shape[1], sparsity)).view(rows, columns)
    mask = torch.empty(rows, columns, dtype=torch.bool)
    for piece in row_pieces(rows, columns):
        if pattern == "2:4":
            mask[piece] = _two_of_four(score[piece])
        else:
            mask[piece] = largest(score[piece], columns - pruned_of(columns, sparsity))
    return mask


def largest(score: Tensor, keep: int) -> Tensor:
    """Mask of each row's ``keep`` highest scores, the first of equals: bool, the shape of ``score``."""
    count = score.shape[1]
    if keep >= count:
        return torch.ones(score.shape, dtype=torch.bool)
    if keep <= 0:
        return torch.zeros(score.shape, dtype=torch.bool)
    threshold = score.kthvalue(count - keep + 1, dim=1, keepdim=True).values  # the least score that stays
    above, equal = score > threshold, score == threshold
    missing = keep - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= missing))


def known_squares(squares: Tensor, columns: int) -> Tensor:
    """Mean squares [columns] of the inputs over their mean, float64; an input that no token reached counts as 1.

    Raises ``InputError`` for squares of another shape, or not finite.
    """
    if tuple(squares.shape) != (columns,) or not bool(torch.isfinite(squares).all()):
        raise InputError(f"the statistics of {columns} inputs must be as many finite numbers")
    squares = squares.double().clamp(min=0)
    reached = squares > 0
    if not bool(reached.any()):
        return torch.ones_like(squares)
    return torch.where(reached, squares / squares[reached].mean(), 1.0)


def _two_of_four(score: Tensor) -> Tensor:
    rows, columns = score.shape
    padded = torch.full((rows, 4 * fours(columns)), -1.0, dtype=score.dtype)  # below every score
    padded[:, :columns] = score
    return largest(padded.view(-1, 4), 2).view(rows, -1)[:, :columns]
