"""Singular values of a weight, and how many of them a threshold drops.

    t_i = (s_i - s_r) / (s_top - s_r),   r = min(m, n),   s_top = the largest, or a quantile below it

t does not change when the weight is scaled or rotated: it is the shape of the spectrum alone.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """``values``: the singular values of a matrix [rows, columns], ascending."""

    values: tuple[float, ...]
    rows: int
    columns: int

    def normalised(self, top: float = 1.0) -> tuple[float, ...]:
        """t, ascending; ``top`` is the quantile that counts as largest. All ones where there is no spread."""
        low, high = self.values[0], float(np.quantile(self.values, top))
        if not high > low:
            return (1.0,) * len(self.values)
        return tuple((value - low) / (high - low) for value in self.values)

    def share(self, rank: int) -> float:
        """What factors of this rank hold of the matrix's values; more than 1 where they save nothing."""
        return rank * (self.rows + self.columns) / (self.rows * self.columns)


def spectrum_of(weight: Tensor) -> Spectrum:
    """From the eigenvalues of the smaller Gram matrix, in float64."""
    rows, columns = weight.shape
    matrix = weight.double() if rows <= columns else weight.double().T
    values = torch.linalg.eigvalsh(matrix @ matrix.T).clamp(min=0).sqrt()
    return Spectrum(tuple(values.tolist()), rows, columns)


def dropped(measure: tuple[float, ...], threshold: float) -> int:
    """How many entries of an ascending run lie below the threshold."""
    return bisect_left(measure, threshold)
