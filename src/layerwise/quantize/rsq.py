"""RSQ: GPTQ in which tokens that receive much attention count more.

    minimise  sum_t w_t ||(W - W') x_t||^2,     H_w = sum_t w_t x_t x_t^T / sum_t w_t,     w_t = r_t^2

    a_t = sum over heads h and queries s of A[h, s, t],     r_t = least + (1 - least) (a_t - min a) / (max a - min a)

with A the attention probabilities of the block that the linear belongs to, on the dense block's input, and min and max
over the tokens of a sequence. Scaling every input ``x_t`` by ``r_t`` and then applying GPTQ is the same thing. With
``least=1`` all tokens weigh alike and the codes are GPTQ's bit for bit; so they are where a linear belongs to no block
with attention, or to an expert that no token reached.

The paper's first step is a rotation of the whole network that spreads outliers over the channels. It changes no
function and no bytes, so it is not part of this encoder: rotate with ``--rewrite hadamard`` and encode the rotated
network with ``rsq``; importance is measured on the network that is encoded, and a rotation leaves it as it is.

The first token of a text often receives nearly all attention, and with a small ``least`` little else is left in
``H_w``. The number of tokens that as good as count, ``(sum w)^2 / sum w^2``, is therefore kept at or above twice the
number of columns (or at that of all tokens, if they are fewer): ``least`` is raised by steps of a half until it is, up
to 1.

Source: Y.-L. Sung et al., arXiv 2503.01820. Left open there: the power (features scaled by r give ``r^2``, which is the
default; the released code weighs by r: ``power=1``), and what happens when too few tokens are left (ours: above). The
copies of shifted sequences that the paper adds to the calibration set are not made here. The paper tunes ``least``
among 0.005 to 0.1; measured here, without a rotation, on docs-lm at 3 bits (128 sequences, KL on held-out text): 0.0716
at 0.02, 0.0681 at 0.1, 0.0657 at 0.5, and GPTQ 0.0657; at 2 bits 0.363 at 0.1, 0.349 at 0.5 and GPTQ 0.344. Weighing
tokens gains nothing on that network, which is why it is mild by default. Choices of ours in GPTQ are
those of ``quantize.gptq``: static grids, clip search weighted by the diagonal, here of ``H_w``.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from layerwise.roles import Encoder
from layerwise.technique import SECOND_MOMENT, TOKEN_IMPORTANCE, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout
    from layerwise.encoding.grid import Grid

STEP = 1.5  # factor by which ``least`` rises while too few tokens count
log = logging.getLogger(__name__)


@technique(
    paper="RSQ",
    needs={SECOND_MOMENT, TOKEN_IMPORTANCE},
    left_out="shifted copies of the text; its rotation is --rewrite hadamard",
)
class Rsq(Encoder):
    """GPTQ on inputs that weigh by the attention their tokens receive."""

    bits: int = option(4, minimum=2, maximum=8, help="bits per weight")
    group: int = option(64, minimum=0, help="columns that share a scale; 0 = the whole row")
    symmetric: bool = option(False, help="store no zeros")
    scale_bits: int = option(16, choices=(8, 16), help="bits of a stored scale")
    clip: bool = option(True, help="search each group's range for the least error")
    damp: float = option(0.01, minimum=0, maximum=10, help="share of mean(diag H) added to the diagonal")
    act_order: bool = option(True, help="round the columns of the largest inputs first")
    least: float = option(0.5, minimum=0.001, maximum=1, help="r of the least important token; 1 = all count alike")
    power: int = option(2, choices=(1, 2), help="a token weighs by r to this power")

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        from layerwise.quantize._rounding import check_statistics, one_sided

        check_statistics(weight, statistics)
        moment = self.moment(statistics)
        return one_sided(
            weight, moment, self._grid(), clip=self.clip, damp=self.damp, act_order=self.act_order,
            shared=statistics.shared,
        )  # fmt: skip

    def moment(self, statistics: SiteStatistics) -> Tensor:
        """``H_w`` of the module's docstring, ``[n, n]`` or its diagonal."""
        from layerwise.calibrate.moments import TOKENS_PER_INPUT

        known, inputs = statistics.importance, statistics.inputs
        if known is None:
            return inputs
        least = float(self.least)
        enough = min(1.0, TOKENS_PER_INPUT * len(inputs) / max(1, statistics.tokens))
        while least < 1 and known.effective(least, self.power) < enough:
            least = min(1.0, least * STEP)
        if least > self.least:
            log.info("too few tokens would count for %d columns: least raised to %g", len(inputs), least)
        return known.weighted(inputs, least, self.power)

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.encoding.integer import integer_layout

        return integer_layout(self._grid(), rows, columns)

    def _grid(self) -> Grid:
        from layerwise.encoding.grid import Grid

        return Grid(self.bits, self.group, self.symmetric, self.scale_bits)
