"""CALDERA: a weight as grouped integers plus a low-rank part, each fitted to what the other leaves over.

    minimise tr(H (Q + A B - W)^T (Q + A B - W)),   Q on a grid of few bits,   A [m, k],  B [k, n] in few bits too

    A B = best rank k of W - Q (in the whitened sense);    Q = W - A B rounded with feedback;    ``rounds`` times

The low-rank part carries the few directions that the inputs see most and frees the grid of them. W is [m, n] and
k = ratio m n / (m + n). What is stored is the sum of the integer form and the factors.

Source: R. Saha et al., *Compressing Large Language Models using Low Rank and Low Precision Decomposition*, arXiv
2405.18886. Choices of ours: the low-rank part comes first (Q = 0 at the start); no Hadamard rotation, and uniform grids
with clip-searched groups in place of a lattice codebook; of all rounds the one of least objective is kept;
``curvature=loss`` puts the loss's two sides in place of H alone, for the truncation and for the rounding alike
(``inputs`` is the paper's); the paper runs more rounds.

Measured on a causal LM of 2.4 M parameters (damage on other tokens, 14 of its linears, groups of 128, 8-bit scales;
bits per weight: damage): 2 bits + ratio 0.05 / 0.1 / 0.2, ``loss``, 8 rounds: 2.37: 0.057, 2.59: 0.045, 3.02: 0.030;
two-sided rounding alone 2.18: 0.071, 2.40: 0.060, 3.22: 0.016. Of 0.1: one round 0.053, 16 rounds 0.042. It pays
between 2 and 3 bits, and most on the table: 2.63: 0.089, alone 2.42: 0.148, 3.25: 0.041.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Encoder
from layerwise.technique import GRADIENT_MOMENT, SECOND_MOMENT, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout
    from layerwise.encoding.grid import Grid


@technique(
    paper="CALDERA",
    needs={SECOND_MOMENT, GRADIENT_MOMENT},
    menu=tuple(
        f"bits={bits},group=128,scale_bits=8,ratio={ratio},curvature=loss"
        for bits, ratio in ((2, 0.05), (2, 0.1), (2, 0.2), (3, 0.05), (3, 0.1))
    ),
)
class Caldera(Encoder):
    """Few-bit integers plus a low-rank correction, fitted in turns."""

    bits: int = option(2, minimum=2, maximum=8, help="bits per weight of the grid")
    group: int = option(64, minimum=0, help="columns that share a scale; 0 = the whole row")
    scale_bits: int = option(16, choices=(8, 16), help="bits of a stored scale of the grid")
    ratio: float = option(0.1, minimum=0.001, maximum=2, help="values of the factors as a share of the weight's")
    factor_bits: int = option(4, choices=(2, 3, 4, 5, 6, 8, 16), help="bits of the factors; 16 = fp16")
    factor_group: int = option(64, minimum=0, help="columns of a factor that share a scale; 0 = the whole row")
    curvature: str = option(
        "inputs", choices=("inputs", "loss"), help="what errors are weighed by: inputs, or both sides"
    )
    damp: float = option(0.01, minimum=0, maximum=10, help="share of mean(diag H) added to the diagonal of H")
    row_damp: float = option(0.5, minimum=0, maximum=100, help="the same for the rows, with curvature=loss")
    rounds: int = option(8, minimum=1, maximum=50, help="times grid and factors are fitted to each other")

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        from layerwise.encoding.grid import check_weight
        from layerwise.encoding.sums import Sum
        from layerwise.factorize._whitening import curvatures, rank_of, rounded, store_factors
        from layerwise.quantize._rounding import check_statistics

        check_weight(weight)
        check_statistics(weight, statistics)
        rows, columns = curvatures(statistics, self.curvature, self.damp, self.row_damp)
        rank, dense = rank_of(self.ratio, *weight.shape), weight.double()
        best, least, left_over = None, float("inf"), dense
        for _ in range(self.rounds):
            factors = store_factors(left_over, rows, columns, rank, self.factor_bits, self.factor_group)
            quantized = rounded(dense - factors.decode(), rows, columns, self._grid())
            found = Sum(quantized, factors)
            left_over = dense - quantized.decode()
            change = found.decode() - dense
            loss = float((rows.times(change) * columns.times(change.T.contiguous()).T).sum())
            if best is None or loss < least:
                best, least = found, loss
        assert best is not None
        return best

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.encoding.integer import integer_layout
        from layerwise.encoding.sums import sum_layout
        from layerwise.factorize._whitening import factors_layout, rank_of

        factors = factors_layout(rows, columns, rank_of(self.ratio, rows, columns), self.factor_bits, self.factor_group)
        return sum_layout(integer_layout(self._grid(), rows, columns), factors)

    def _grid(self) -> Grid:
        from layerwise.encoding.grid import Grid

        return Grid(self.bits, self.group, scale_bits=self.scale_bits)
