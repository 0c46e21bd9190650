"""ASVD: a weight is factorized with its columns scaled by how large their inputs are.

    d_j = (E|x_j|)^alpha,   W diag(d) = U Sigma V^T,   W' = U_k Sigma_k V_k^T diag(d)^-1
    ||(W' - W) diag(d)||_F^2 = sum_{i > k} sigma_i^2,   k = floor(ratio m n / (m + n))

A column whose inputs are large keeps more of itself. That is whitening by a diagonal: exact where inputs are
uncorrelated and d is their root mean square, an approximation of SVD-LLM's whole second moment otherwise;
alpha = 0 is the plain SVD.

Source: Z. Yuan et al., *ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models*,
arXiv 2312.05821; alpha = 0.5 is the paper's. The paper gives each layer a ratio by the perplexity of the network with
that layer alone factorized; here the planner chooses among ratios, by predicted damage. Scales are taken over their
mean and kept above ``damp`` of it, where the paper adds 1e-6. Factors below 16 bits are grouped integers, rounded with
feedback against each other.

Measured on docs-lm: KL 0.38 at ratio 0.8 in 16 bits, 2.34 and 2.36 at 0.5 in 8 and 4 bits; plain SVD 0.53, 2.66, 2.70
in the same bytes. So the idea holds; rounded integers of as many bytes are far better still (0.0002, 0.026, 0.47).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Encoder
from layerwise.technique import ABSOLUTE_MEAN, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout
    from layerwise.factorize._whitening import Curvature


@technique(
    paper="ASVD",
    needs={ABSOLUTE_MEAN},
    menu=("ratio=0.8", "ratio=0.5,factor_bits=8", "ratio=0.5,factor_bits=4"),
    left_out="the search of each layer's ratio by perplexity, which the planner replaces",
)
class Asvd(Encoder):
    """Two thin factors in place of a weight, truncated where columns are scaled by their inputs."""

    ratio: float = option(0.8, minimum=0.001, maximum=4, help="share of the weight's values that the factors hold")
    alpha: float = option(0.5, minimum=0, maximum=2, help="power of the inputs' absolute mean; 0 = plain SVD")
    factor_bits: int = option(16, choices=(2, 3, 4, 5, 6, 8, 16), help="bits of the factors; 16 = fp16")
    factor_group: int = option(64, minimum=0, help="columns of a factor that share a scale; 0 = the whole row")
    damp: float = option(1e-3, minimum=1e-6, maximum=1, help="least scale of a column, as a share of the mean scale")
    rounds: int = option(4, minimum=1, maximum=20, help="times the rounded factors are fitted to each other")

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        from layerwise.encoding.grid import check_weight
        from layerwise.factorize._whitening import flat, rank_of, store_factors
        from layerwise.quantize._rounding import check_statistics

        check_weight(weight)
        check_statistics(weight, statistics)
        rank, rows, columns = rank_of(self.ratio, *weight.shape), flat(weight.shape[0]), self.scaling(statistics)
        return store_factors(weight, rows, columns, rank, self.factor_bits, self.factor_group, self.rounds)

    def scaling(self, statistics: SiteStatistics) -> Curvature:
        """diag(d^2) over its mean."""
        from layerwise.factorize._whitening import Curvature, flat

        scale = statistics.absolute_mean.double().clamp(min=0) ** self.alpha
        mean = float(scale.mean())
        if not 0 < mean < float("inf"):
            return flat(len(scale))
        return Curvature(None, (scale / mean).clamp(min=self.damp) ** 2)

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.factorize._whitening import factors_layout, rank_of

        return factors_layout(rows, columns, rank_of(self.ratio, rows, columns), self.factor_bits, self.factor_group)
