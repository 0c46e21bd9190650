"""GPTQ: columns are rounded one after another, and those still to come absorb each one's error.

    minimise tr(D H D^T),   D = W' - W [m, n],   H = E[x x^T] [n, n]

In the paper each row's optimal update after rounding column j is ``W[:, j+1:] -= e_j U[j, j+1:]`` with U the upper
Cholesky factor of ``H^-1``. With ``H + damp mean(diag H) I = (I + M) D_h (I + M)^T``, M strictly upper triangular, the
same codes come from

    W'_j = nearest grid point to  W_j + (W - W')[:, :j] M[:j, j]

which needs no inverse; this is what runs here, and a test checks it against the paper's update. Rows are independent.

Source: E. Frantar et al., arXiv 2210.17323; the equivalence: J. Chee et al., QuIP, arXiv 2307.13304. Choices of ours:
grids are static (fitted to the original W, so columns may be taken in any order and the stored layout stays plain);
ranges are clip-searched, weighted by ``diag H``; a column that no token reached (``H_jj = 0``) is rounded where the
paper's code sets it to zero; when the factorisation fails, damping rises tenfold. A site that keeps only ``diag H``
gets plain rounding, which is what GPTQ does there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Encoder
from layerwise.technique import SECOND_MOMENT, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout
    from layerwise.encoding.grid import Grid


@technique(paper="GPTQ", needs={SECOND_MOMENT})
class Gptq(Encoder):
    """Column-by-column rounding that lets later columns absorb the error of earlier ones."""

    bits: int = option(4, minimum=2, maximum=8, help="bits per weight")
    group: int = option(64, minimum=0, help="columns that share a scale; 0 = the whole row")
    symmetric: bool = option(False, help="store no zeros")
    scale_bits: int = option(16, choices=(8, 16), help="bits of a stored scale")
    clip: bool = option(True, help="search each group's range for the least error")
    damp: float = option(0.01, minimum=0, maximum=10, help="share of mean(diag H) added to the diagonal")
    act_order: bool = option(True, help="round the columns of the largest inputs first")

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        from layerwise.quantize._rounding import check_statistics, one_sided

        check_statistics(weight, statistics)
        moment = statistics.inputs
        return one_sided(
            weight, moment, self._grid(), clip=self.clip, damp=self.damp, act_order=self.act_order,
            shared=statistics.shared,
        )  # fmt: skip

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.encoding.integer import integer_layout

        return integer_layout(self._grid(), rows, columns)

    def _grid(self) -> Grid:
        from layerwise.encoding.grid import Grid

        return Grid(self.bits, self.group, self.symmetric, self.scale_bits)
