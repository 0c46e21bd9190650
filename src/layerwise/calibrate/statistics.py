"""What calibration measures at a site, as values.

A stored matrix ``[rows, columns]`` may be used more than once (a tied table is a look-up and a head). Every use
contributes ``scale * tr(R D C D^T)`` to the predicted rise of the loss when the matrix changes by ``D``:

=============  =======================  ==========================  ==========================
use            R (rows)                 C (columns)                 scale
=============  =======================  ==========================  ==========================
linear         G = E[g g^T]             H = E[x x^T]                c * n_site / n_loss
table          token counts (diagonal)  G of the looked-up vectors  c / n_loss
head           E[p (1 - p)] (diagonal)  H = E[x x^T]                c * n_site / n_loss
=============  =======================  ==========================  ==========================
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LARGEST_FULL_SIDE = 16_384  # a wider side keeps only its diagonal


@dataclass(frozen=True)
class Use:
    """One use of a stored matrix ``[rows, columns]``.

    rows:           R, ``[rows, rows]`` or its diagonal ``[rows]``, float32.
    columns:        C, ``[columns, columns]`` or its diagonal ``[columns]``, float32.
    absolute_mean:  mean ``|x|`` of each input, ``[columns]``.
    scale:          factor that turns ``tr(R D C D^T)`` into the loss's unit.
    tokens:         tokens that were measured.
    """

    rows: Tensor
    columns: Tensor
    absolute_mean: Tensor
    scale: float
    tokens: int


@dataclass(frozen=True)
class SiteStatistics:
    """All uses of one site's matrix; most sites have one."""

    uses: tuple[Use, ...]

    @cached_property
    def columns(self) -> Tensor:
        """The column curvature that an encoder rounds against: C, or the uses' weighted sum. ``[n, n]`` or ``[n]``."""
        if len(self.uses) == 1:
            return self.uses[0].columns
        return sum_of_sides([(u.scale * mean_diagonal(u.rows), u.columns) for u in self.uses])

    @cached_property
    def rows(self) -> Tensor:
        """The row curvature: R, or the uses' weighted sum. ``[m, m]`` or ``[m]``."""
        if len(self.uses) == 1:
            return self.uses[0].rows
        return sum_of_sides([(u.scale * mean_diagonal(u.columns), u.rows) for u in self.uses])

    @property
    def absolute_mean(self) -> Tensor:
        return self.uses[0].absolute_mean

    @property
    def tokens(self) -> int:
        return sum(u.tokens for u in self.uses)

    @staticmethod
    def uninformed(rows: int, columns: int) -> SiteStatistics:
        """Statistics of a site about which nothing is known: every direction matters alike."""
        ones = torch.ones(columns)
        return SiteStatistics((Use(torch.ones(rows), ones, ones, 1.0 / (rows * columns), 0),))


def diagonal(side: Tensor) -> Tensor:
    """Diagonal ``[n]`` of a side that is stored whole or as its diagonal."""
    return side if side.dim() == 1 else side.diagonal()


def mean_diagonal(side: Tensor) -> float:
    return float(diagonal(side).double().mean())


def sum_of_sides(terms: list[tuple[float, Tensor]]) -> Tensor:
    """Weighted sum; diagonal only if every term is."""
    whole = any(side.dim() == 2 for _, side in terms)
    return torch.stack([w * (torch.diag(s) if whole and s.dim() == 1 else s) for w, s in terms]).sum(0)
