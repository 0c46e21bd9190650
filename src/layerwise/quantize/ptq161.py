"""PTQ1.61: whole input columns at four bits, all others binary, bent by a rank-one correction.

    W'[:, salient] = four bits, asymmetric, one range a row
    W'_ij = r1_i r2_j (mu_i + a_i s_ij)  elsewhere,    s = sign(W - mu), mu_i = mean and a_i = mean |W - mu| of row i

A mask of columns costs one bit a *column*. r1 is folded into mu and a, as it is stored, and r2 into the input, so the
product stays a plain binary one. bits per weight of an m x n matrix with ``share`` salient columns, count = round(n
share): ``(4 count + (n - count)) / n`` plus (20 + 32) / n for the rows' ranges, scales and means and 1 / m + 16 (1 -
share) / m for mask and r2. At a share of 0.2 the first term is the paper's 1.6; the rest is counted here as well.

Source: J. Zhao et al., "PTQ1.61: Push the Real Limit of Extremely Low-Bit Post-Training Quantization Methods for
Large Language Models", arXiv 2502.13179. There a, r1 and r2 are *trained* block by block, after the network has been
bent towards binary weights by a low-rank training run of its own; neither is here. Instead a, mu (with r1 inside) and
r2 are fitted by alternating weighted least squares, ``rounds`` times:

    (mu_i, a_i) = argmin sum_j h_j (w_ij - r2_j (mu_i + a_i s_ij))^2        two unknowns a row, in closed form
    r2_j = sum_i v_i w_ij c_ij / sum_i v_i c_ij^2,  c = mu + a s, kept within 1/4 .. 4

h the mean squares of the inputs, v those of the outputs' gradients. The paper's salience is max |x_j|; ours is
``salience``: the mean |x_j| (``mean``), the root mean square (``square``) or what the column's rounding costs the loss
(``loss``: its curvature times the mean square of its weights). Ours too: a centred a (theirs is mean |W|, never
better), signs that follow the fit, and ``feedback``: codes of both kinds chosen against the loss, errors absorbed by
later columns and rows. A matrix with too few columns for one salient one is binary throughout.

Measured on ``examples/docs-lm`` (rows of 192 and 512 weights, so 0.2 bits of scales a weight; KL to the dense network,
int8 tables, two seeds): a share of 0.2 leaves 1.18 in 923 kB, where rounding to nearest at 2 bits, a scale a row,
leaves 0.51 in 950 kB; with feedback 1.24, no better. One ternary plane with feedback takes fewer bytes (1.72 against
2.05 bits a weight of the linears) and does less predicted damage (0.34 against 0.57). Without the training that the
paper rests on, its form is no good use of bytes here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Encoder
from layerwise.technique import ABSOLUTE_MEAN, GRADIENT_MOMENT, INPUT_SQUARES, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout
    from layerwise.encoding.grid import Grid

BENT = 4.0  # largest factor of a column, and one over the smallest
SALIENT_BITS = 4


@technique(
    paper="PTQ1.61",
    needs={GRADIENT_MOMENT, INPUT_SQUARES, ABSOLUTE_MEAN},
    menu=("share=0.2", "share=0.05,feedback=true", "share=0.2,feedback=true"),
    left_out="scales trained block by block and the preprocessing of the weights; scales are fitted in closed form",
)
class Ptq161(Encoder):
    """Salient input columns at four bits, the others at one."""

    share: float = option(0.2, minimum=0, maximum=0.9, help="share of the columns that keep four bits")
    salience: str = option("mean", choices=("mean", "square", "loss"), help="which columns are salient")
    rounds: int = option(8, minimum=0, maximum=100, help="alternations of the rank-one fit; 0 = plain averages")
    feedback: bool = option(False, help="round against the loss, errors absorbed by later columns and rows")

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        import torch

        from layerwise.calibrate.statistics import diagonal
        from layerwise.encoding.binary import Binary
        from layerwise.encoding.grid import check_weight, fit_grid, relative_importance
        from layerwise.encoding.integer import GroupedInteger
        from layerwise.encoding.scales import Scales
        from layerwise.encoding.split import Split
        from layerwise.quantize._levels import Feedback, place, rescaled

        check_weight(weight)
        rows, columns = weight.shape
        feedback = Feedback.of(weight, statistics, self.feedback)
        h = relative_importance(feedback.importance(statistics), columns)
        v = relative_importance(diagonal(statistics.rows), rows)
        weight = weight.detach().float()
        mask = self.salient(weight, statistics)
        scale, mean, bend = self.fit(weight[:, ~mask].double(), h[~mask].double(), v.double())
        scales, mean, bend = Scales.of(scale[:, None], 16), mean.half(), bend.half()

        factors = torch.ones(columns).masked_scatter_(~mask, bend.float())
        step, centre = scales.values()[:, 0], mean.float()
        levels = torch.full((rows, 2, 2**SALIENT_BITS), torch.inf)
        levels[:, 1, 0], levels[:, 1, 1] = centre - step, centre + step
        fitted = None
        if mask.any():
            fitted = fit_grid(weight[:, mask], self._grid(), clip=True, importance=h[mask])
            ladder = torch.arange(2**SALIENT_BITS).float()
            levels[:, 0] = (ladder - fitted.zeros()) * fitted.steps()  # one group a row
        codes = place(weight / factors, levels, (~mask).long(), rescaled(feedback, factors))
        second = Binary.from_codes(codes[:, ~mask].contiguous(), 0, scales, mean)
        if fitted is None:
            return second
        return Split(GroupedInteger.from_codes(codes[:, mask].contiguous(), fitted), second, mask, bend)

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.encoding.binary import binary_layout
        from layerwise.encoding.integer import integer_layout
        from layerwise.encoding.split import split_layout

        count = self.count(columns)
        second = binary_layout(0, 16, True, rows, columns - count)
        if not count:
            return second
        first = integer_layout(self._grid(), rows, count)
        return split_layout(first, second, columns, columns - count, True)

    def count(self, columns: int) -> int:
        """Salient columns: at least one is left to be binary."""
        return min(round(self.share * columns), columns - 1)

    def salient(self, weight: Tensor, statistics: SiteStatistics) -> Tensor:
        """Which columns are: bool [n], exactly ``count`` of them, the first of equals."""
        import torch

        from layerwise.calibrate.statistics import diagonal

        if self.salience == "mean":
            worth = statistics.absolute_mean.double()
        elif self.salience == "square":
            worth = diagonal(statistics.inputs).double()
        else:
            worth = diagonal(statistics.columns).double() * weight.double().square().mean(0)
        order = torch.argsort(worth, descending=True, stable=True)
        return torch.zeros(len(worth), dtype=torch.bool).index_fill_(0, order[: self.count(len(worth))], True)

    def fit(self, weight: Tensor, h: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(a r1 [m], mu r1 [m], r2 [n]) for the columns that are not salient, all float64."""
        import torch

        mean = weight.mean(1)
        scale = (weight - mean[:, None]).abs().mean(1)
        bend = torch.ones(weight.shape[1], dtype=weight.dtype)
        for _ in range(self.rounds):
            signs = torch.where(weight >= bend * mean[:, None], 1.0, -1.0).to(weight.dtype)
            mean, scale = rows_of_least_error(weight, bend, signs, h, mean, scale)
            c = mean[:, None] + scale[:, None] * signs
            below = v @ c.square()
            bend = torch.where(below > 0, (v @ (weight * c)) / below.clamp(min=1e-300), torch.ones_like(bend))
            bend = bend.clamp(1 / BENT, BENT)
        return scale, mean, bend

    def _grid(self) -> Grid:
        from layerwise.encoding.grid import Grid

        return Grid(SALIENT_BITS, 0)


def rows_of_least_error(
    weight: Tensor, bend: Tensor, signs: Tensor, h: Tensor, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean and scale of each row of least ``sum_j h_j (w_ij - r_j (mu_i + a_i s_ij))^2``, a not below zero.

    ``mean`` and ``scale`` are what a row keeps where the two unknowns cannot be told apart (all its signs are equal).
    """
    import torch

    once, twice = h * bend, (h * bend.square()).sum()
    cross = signs @ (h * bend.square())
    to_mean, to_scale = weight @ once, (weight * signs) @ once
    determinant = twice * twice - cross * cross
    told = determinant > 1e-9 * twice * twice
    safe = torch.where(told, determinant, torch.ones_like(determinant))
    mean_found = (twice * to_mean - cross * to_scale) / safe
    scale_found = (twice * to_scale - cross * to_mean) / safe
    told &= scale_found >= 0
    return torch.where(told, mean_found, mean), torch.where(told, scale_found, scale)
