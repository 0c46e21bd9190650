"""Plain SVD: two thin factors in place of a weight, the nearest of their rank to the weight itself.

    W ~ A B,   A = U_k Sigma_k^(1/2) [m, k],   B = Sigma_k^(1/2) V_k^T [k, n],   W = U Sigma V^T
    ||W - A B||_F^2 = sum_{i > k} sigma_i^2,   k = floor(ratio m n / (m + n))

No data is read, so every input counts alike: the baseline that ASVD and SVD-LLM improve on, and the candidates between
which WELORE allots ranks. ``ratio`` of the weight's values are stored; factors below 16 bits are grouped integers, each
rounded with feedback and fitted to the other (see ``factorize._whitening``).

C. Eckart and G. Young, "The approximation of one matrix by another of lower rank", Psychometrika 1, 1936.

Measured on docs-lm: KL 0.53 at ratio 0.8 in 16 bits, 2.66 and 2.70 at 0.5 in 8 and 4 bits, where rounded integers of
as many bytes leave 0.0002, 0.026 and 0.47: factors alone are not worth their bytes here. They are faster: one token
through 2048 x 2048 takes 0.92 ms by torch's fp32 product, 0.36 ms from fp16 factors of ratio 0.5 and 0.16 ms of 0.25;
64 tokens 7.6, 4.1 and 1.9 ms (one core of a Zen 4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Encoder
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout


@technique(paper="SVD", menu=("ratio=0.8", "ratio=0.5,factor_bits=8", "ratio=0.5,factor_bits=4"))
class Svd(Encoder):
    """Two thin factors in place of a weight, truncated as they are."""

    ratio: float = option(0.8, minimum=0.001, maximum=4, help="share of the weight's values that the factors hold")
    factor_bits: int = option(16, choices=(2, 3, 4, 5, 6, 8, 16), help="bits of the factors; 16 = fp16")
    factor_group: int = option(64, minimum=0, help="columns of a factor that share a scale; 0 = the whole row")
    rounds: int = option(4, minimum=1, maximum=20, help="times the rounded factors are fitted to each other")

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        from layerwise.encoding.grid import check_weight
        from layerwise.factorize._whitening import flat, rank_of, store_factors

        check_weight(weight)
        sides = [flat(size) for size in weight.shape]
        rank = rank_of(self.ratio, *weight.shape)
        return store_factors(weight, sides[0], sides[1], rank, self.factor_bits, self.factor_group, self.rounds)

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.factorize._whitening import factors_layout, rank_of

        return factors_layout(rows, columns, rank_of(self.ratio, rows, columns), self.factor_bits, self.factor_group)
