"""What is read off the Hessian of the loss at one site: its largest eigenvalue and its mean eigenvalue.

The loss compares the network with itself, so at the dense network its derivative is zero and its Hessian is the
Gauss-Newton matrix. With the Kronecker form of ``calibrate/statistics.py`` the block of a matrix W [m, n] is

    Hess = 2 scale (R (x) C),     damage(D) = 1/2 vec(D)^T Hess vec(D) = scale tr(R D C D^T)

    top eigenvalue  = 2 scale lambda_max(R) lambda_max(C)          mean eigenvalue = 2 scale tr(R) tr(C) / (m n)

A matrix with several uses (a tied table and head) has the sum of such blocks, whose largest eigenvalue comes from
power iteration on ``D -> sum 2 scale R D C``. The trace is exact whatever the form: ``tr(R) tr(C)`` was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics, Use, diagonal, mean_diagonal

STEPS = 200
TOLERANCE = 1e-6  # relative change of the eigenvalue that ends the iteration
EXACT_WIDTH = 1024  # a side up to this wide is decomposed, which costs less than iterating to the same accuracy


@dataclass(frozen=True)
class Hessian:
    """Figures of one site.

    eigenvalue: the largest of the loss's Hessian block, in the loss's unit per squared weight.
    mean:       its average eigenvalue, the trace over the number of weights.
    inputs:     mean of the diagonal of E[x x^T]: the average trace of the layer's own Hessian, without the loss.
    """

    eigenvalue: float
    mean: float
    inputs: float


def hessian_of(statistics: SiteStatistics) -> Hessian:
    """All figures; finite and not negative."""
    return Hessian(top_eigenvalue(statistics), mean_eigenvalue(statistics), mean_diagonal(statistics.inputs))


def top_eigenvalue(statistics: SiteStatistics) -> float:
    """Largest eigenvalue of the site's Hessian block; computed once for all candidates."""
    made = statistics.remembered("top eigenvalue", 0, lambda: _top_eigenvalue(statistics))
    return float(made)


def mean_eigenvalue(statistics: SiteStatistics) -> float:
    """Trace of the site's Hessian block over its number of weights."""
    return sum(2 * use.scale * mean_diagonal(use.rows) * mean_diagonal(use.columns) for use in statistics.uses)


def _top_eigenvalue(statistics: SiteStatistics) -> float:
    if len(statistics.uses) == 1:
        use = statistics.uses[0]
        return 2 * use.scale * _largest(use.rows) * _largest(use.columns)
    return _largest_of_sum(statistics.uses)


def _largest(side: Tensor) -> float:
    """Largest eigenvalue of one side, ``[n, n]`` or its diagonal ``[n]``."""
    if side.dim() == 1 or len(side) == 1:
        return max(0.0, float(diagonal(side).max()))
    if len(side) <= EXACT_WIDTH:
        return max(0.0, float(torch.linalg.eigvalsh(side.double())[-1]))
    return _iterate(_start(diagonal(side)), lambda v: side @ v)


def _largest_of_sum(uses: tuple[Use, ...]) -> float:
    def product(d: Tensor) -> Tensor:
        return torch.stack([2 * use.scale * _columns(_rows(d, use.rows), use.columns) for use in uses]).sum(0)

    weights = [2 * use.scale * torch.outer(diagonal(use.rows), diagonal(use.columns)) for use in uses]
    return _iterate(_start(torch.stack(weights).sum(0)), product)


def _start(diagonal_of_block: Tensor) -> Tensor:
    """A start that meets every eigenvector, most of all those where the diagonal is large."""
    noise = torch.randn(diagonal_of_block.shape, generator=torch.Generator().manual_seed(0))
    return (noise + noise.sign()) * (diagonal_of_block / diagonal_of_block.max().clamp_min(1e-30) + 1e-3)


def _iterate(vector: Tensor, product) -> float:  # type: ignore[no-untyped-def]
    known = 0.0
    vector = vector / vector.norm()
    for _ in range(STEPS):
        turned = product(vector)
        value = float(turned.norm())
        if value <= 0:
            return 0.0
        vector = turned / value
        if abs(value - known) <= TOLERANCE * value:
            break
        known = value
    return value


def _rows(d: Tensor, rows: Tensor) -> Tensor:
    return rows.unsqueeze(1) * d if rows.dim() == 1 else rows @ d


def _columns(d: Tensor, columns: Tensor) -> Tensor:
    return d * columns if columns.dim() == 1 else d @ columns
