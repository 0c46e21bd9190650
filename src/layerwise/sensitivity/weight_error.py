"""The size of a change, whatever the network does with it:  score = ||D||^2,  D = W' - W.

The baseline that every other scorer has to beat: it knows neither inputs nor loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Scorer
from layerwise.technique import technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics


@technique(paper="baseline")
class WeightError(Scorer):
    """Squared length of the change: a baseline without data."""

    def score(self, change: Tensor, statistics: SiteStatistics) -> float:
        return float(change.double().square().sum())
