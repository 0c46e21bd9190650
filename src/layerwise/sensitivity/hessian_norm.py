"""HAWQ's sensitivity of a change: one number for the Hessian block of the layer, times the size of the change.

    kind=eigenvalue (HAWQ):     score = 1/2 lambda_i ||W' - W||^2            lambda_i the block's largest eigenvalue
    kind=trace      (HAWQ-V2):  score = 1/2 (tr(Hess_i) / n_i) ||W' - W||^2  n_i the number of weights

The first is what the change could cost at worst, the second what it costs on average over directions; both know how
sharply the loss bends at a layer and neither knows in which of its directions. The block is the Gauss-Newton matrix in
Kronecker form (``sensitivity/hessian.py``), where the papers run power iteration or Hutchinson's estimate on products
with the exact block: those need the whole graph of the network in memory, twice differentiated, and here a network is
streamed one block at a time. The loss compares the network with itself, so its exact Hessian is Gauss-Newton and never
indefinite; the Kronecker form is the only approximation. The factor 1/2 puts scores in the unit of the loss.

Measured on docs-lm, rank correlation with the measured rise of storing one linear alone at 2 / 3 / 4 bits: eigenvalue
0.59 / 0.63 / 0.61, trace 0.94 / 0.98 / 0.96, the weight error alone 0.54 / 0.59 / 0.57, the whole Kronecker block
0.91 / 0.98 / 0.96. The mean eigenvalue is the better number: rounding errors have no direction of their own.

Sources: Z. Dong et al., HAWQ, arXiv 1905.03696; HAWQ-V2, arXiv 1911.03852.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Scorer
from layerwise.technique import GRADIENT_MOMENT, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics


@technique(paper="HAWQ", needs={GRADIENT_MOMENT})
class HessianNorm(Scorer):
    """Top (or mean) eigenvalue of the layer's Hessian block times the squared length of the change."""

    kind: str = option("eigenvalue", choices=("eigenvalue", "trace"), help="largest eigenvalue, or their mean")

    def score(self, change: Tensor, statistics: SiteStatistics) -> float:
        from layerwise.sensitivity.hessian import mean_eigenvalue, top_eigenvalue

        bend = top_eigenvalue(statistics) if self.kind == "eigenvalue" else mean_eigenvalue(statistics)
        return 0.5 * bend * float(change.double().square().sum())
