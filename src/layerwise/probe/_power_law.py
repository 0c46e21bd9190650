"""Power laws in the upper tail of a spectrum: maximum likelihood above a threshold, and Hill's estimator.

    density  p(l) ∝ l^-alpha  for l >= xmin:   alpha = 1 + n / sum ln(l / xmin)      n = values >= xmin

The threshold is the value whose fit lies closest to the data (Kolmogorov and Smirnov's distance over the tail):

    D = max_j |1 - (l_j / xmin)^(1 - alpha) - j / n|,   j = 0 … n-1, ascending

Sources: A. Clauset et al., arXiv 0706.1062; B. Hill, Annals of Statistics 3 (1975). Chosen here: equal values are one
candidate; a candidate whose tail is a single repeated value (no spread, infinite exponent) is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

Spectrum = NDArray[np.float64]  # ascending, positive

FEWEST = 10  # values in a tail
FARTHEST = 0.1  # Kolmogorov-Smirnov distance
SPREAD = 1e-12  # mean logarithm above the threshold below which a tail is one repeated value


@dataclass(frozen=True)
class TailFit:
    """A fitted tail: its exponent, where it starts, how many values it holds and how far it lies from them."""

    alpha: float
    xmin: float
    count: int
    distance: float
    searched: bool = True  # the threshold was chosen by the distance, which must then be small

    @property
    def error(self) -> float:
        """Standard error of alpha."""
        return (self.alpha - 1) / sqrt(self.count)

    @property
    def doubt(self) -> str | None:
        """Why this fit must not be read as an exponent; None where it may be."""
        if self.count < FEWEST:
            return f"tail of {self.count}"
        return "no power law" if self.searched and self.distance > FARTHEST else None


def fit_tail(values: Spectrum) -> TailFit | None:
    """The best fit over all thresholds; None where the values do not differ. O(M^2)."""
    logs = np.log(values)
    starts = np.flatnonzero(np.r_[True, values[1:] > values[:-1]])
    best: TailFit | None = None
    for start in starts:
        fit = _fit_above(values, logs, int(start))
        if fit is not None and (best is None or fit.distance < best.distance):
            best = fit
    return best


def hill(values: Spectrum, share: float) -> TailFit | None:
    """Hill's estimator over the largest ``share`` of the values: ``1 + k / sum_{i<=k} ln(l_i / l_{k+1})``.

    No threshold is searched, so the distance is told and not judged. With a share of one half it is the exponent that
    AlphaPruning (arXiv 2410.10912) allocates by.
    """
    k = min(max(1, round(share * len(values))), len(values) - 1)
    if k < 1:
        return None
    logs = np.log(values)
    start = len(values) - k - 1
    total = float((logs[start + 1 :] - logs[start]).sum())
    if total <= SPREAD * k:
        return None
    alpha = 1 + k / total
    return TailFit(alpha, float(values[start]), k, _distance(logs[start:] - logs[start], alpha), False)


def _fit_above(values: Spectrum, logs: Spectrum, start: int) -> TailFit | None:
    above = logs[start:] - logs[start]
    count, total = len(above), float(above.sum())
    if count < 2 or total <= SPREAD * count:
        return None
    alpha = 1 + count / total
    return TailFit(alpha, float(values[start]), count, _distance(above, alpha))


def _distance(above: Spectrum, alpha: float) -> float:
    """``above``: ln(l / xmin) of the tail, ascending."""
    expected = -np.expm1((1 - alpha) * above)
    return float(np.abs(expected - np.arange(len(above)) / len(above)).max())


def determinant_tail(values: Spectrum) -> tuple[int, float]:
    """Where the tail starts by SETOL's condition that its eigenvalues, scaled to mean one, multiply to one.

    Returns how many of the largest values still have a product of at least one, and the smallest of them (scaled).
    """
    scaled = values[::-1] * (len(values) / values.sum())
    count = int(np.flatnonzero(np.cumsum(np.log(scaled)) >= 0)[-1]) + 1 if scaled[0] >= 1 else 1
    return count, float(scaled[count - 1])
