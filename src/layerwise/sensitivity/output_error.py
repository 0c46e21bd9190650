"""Error of the layer's own output:  score = tr(D H D^T) = E||D x||^2,  D = W' - W [m, n], H = E[x x^T] [n, n].

What layer-wise methods (GPTQ and its relatives) make small. The loss is not in it, so layers are compared as if every
output mattered alike; at a table, which has no input, the look-up's gradients stand in for H.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Scorer
from layerwise.technique import SECOND_MOMENT, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics


@technique(paper="baseline", needs={SECOND_MOMENT})
class OutputError(Scorer):
    """Squared error of the layer's output: a baseline without the loss."""

    def score(self, change: Tensor, statistics: SiteStatistics) -> float:
        inputs = statistics.inputs
        turned = change * inputs if inputs.dim() == 1 else change @ inputs
        return max(0.0, float((turned * change).double().sum()))
