"""APTQ: GPTQ in which queries, keys and values are rounded for the attention that they end in.

    minimise tr(D H D^T),   D = W' - W,   H = column curvature of the attention's output, summed over its heads

GPTQ asks that ``W x`` stays for each matrix by itself. For a query, key or value matrix what matters is the output of
the attention, behind the softmax and the output matrix. Its derivatives with respect to the three are known in closed
form (``calibrate.attention_curvature``), and summed over the rows of the matrix their squares are

    H_v = sum_h ||W_o||^2 E[x_t x_t^T],    H_q = scale^2 E[(sum_h ||W_o C_t||^2) x_t x_t^T],
    H_k = scale^2 sum_h E[||q_t||^2 P_t^T W_o^T W_o P_t]

so a token whose attention is settled asks little of the queries, and values are asked for where they are mixed. Output
matrices, the MLP and everything else keep ``H = E[x x^T]``, and there the codes are GPTQ's bit for bit; so they are
where one matrix makes queries, keys and values at once, and where attention is so sharp that the curvature vanishes.

Source: Z. Guan et al., arXiv 2402.14866. Left open there: the derivatives, and how one matrix serves several heads
(ours: the sum over heads, one factorisation a matrix). Its allocation of bits by the trace of H is not an encoder's
work and not done here. Choices of ours in GPTQ are those of ``quantize.gptq``.

Measured once (docs-lm, one calibration seed, KL on held-out text): 0.0749 at 3 bits and 0.400 at 2, where GPTQ has
0.0750 and 0.394: no gain there, where shared key heads and rotary positions make the keys' curvature approximate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Encoder
from layerwise.technique import ATTENTION_CURVATURE, SECOND_MOMENT, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout
    from layerwise.encoding.grid import Grid


@technique(
    paper="APTQ",
    needs={SECOND_MOMENT, ATTENTION_CURVATURE},
    left_out="a factor per head; heads are averaged",
)
class Aptq(Encoder):
    """GPTQ on the curvature of the attention's output."""

    bits: int = option(4, minimum=2, maximum=8, help="bits per weight")
    group: int = option(64, minimum=0, help="columns that share a scale; 0 = the whole row")
    symmetric: bool = option(False, help="store no zeros")
    scale_bits: int = option(16, choices=(8, 16), help="bits of a stored scale")
    clip: bool = option(True, help="search each group's range for the least error")
    damp: float = option(0.01, minimum=0, maximum=10, help="share of mean(diag H) added to the diagonal")
    act_order: bool = option(True, help="round the columns of the largest inputs first")

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        from layerwise.calibrate.statistics import mean_diagonal
        from layerwise.quantize._rounding import check_statistics, one_sided

        check_statistics(weight, statistics)
        moment = statistics.attention
        if moment is None or not mean_diagonal(moment) > 0:
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
