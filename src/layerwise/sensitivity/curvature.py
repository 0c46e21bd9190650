"""layerwise's own score: the predicted rise of the loss, ``sum over uses of scale * tr(R D C D^T)``.

The formula, its unit and its source are in ``sensitivity/kronecker.py``; candidates carry it as their damage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Scorer
from layerwise.technique import GRADIENT_MOMENT, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics


@technique(paper="layerwise", needs={GRADIENT_MOMENT})
class Curvature(Scorer):
    """Predicted rise of the loss, in its own unit: the change against the whole Kronecker block of the Hessian."""

    def score(self, change: Tensor, statistics: SiteStatistics) -> float:
        from layerwise.sensitivity.kronecker import damage

        return damage(change, statistics)
