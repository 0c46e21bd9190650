"""NUPES without data: even rounding of ``|w|^a``, the exponent searched.

    c = the code of the nearest of  s sign(c) (|c| / c_max)^(1 / a),    |c| <= c_max = 2^(b-1) - 1,    s = max |w|

Powers are the only continuous maps of the positive numbers that turn products into products, so products of codes
still stand for products of values; a < 1 puts levels closer together near zero, where most weights are. The exponent
of the matrix (or of each row, ``by_row``) is the one of least ``sum_j h_j (w_j - w'_j)^2``, searched in 64ths, coarse
then fine; 1, the even grid, is always among those tried, so no exponent found is worse than it.

Source: E. Yvinec, A. Dapogny, K. Bailly, "NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search",
arXiv 2308.05600, and their PowerQuant, arXiv 2301.09858, whose data-free form this is; NUPES goes on to train the
exponent and the codes on data, which is not here. Choices of ours: the code of the *nearest level* (theirs rounds
``|w|^a / s`` instead: 0.064 against 0.061 on N(0, 1) at 3 bits); scales per group; ``clip``, a search of the largest
level beside the exponent; ``weighted`` errors; ``feedback``, rounding against the loss. Relative squared error on
N(0, 1), largest level = largest weight: one scale for 200 thousand values a = 0.65, 0.022 (even 0.032) at 4 bits;
groups of 128 a = 0.75, 0.0117 (0.0138); with clip 0.0101 (0.0112): the power is worth much where scales are coarse,
little where they are fine. At 2 bits the form has three levels and no exponent to choose: see TERNARY.

Measured on ``examples/docs-lm`` (KL to the dense network, int8 tables, two seeds): at 4 bits in groups of 128 0.0272
where clip-searched rounding on an even asymmetric grid, 0.7 % larger, leaves 0.0257; at 3 bits 0.124 against 0.099. The
power does not make up for the level that a symmetric grid leaves out and for a zero of its own. With feedback 0.088.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Encoder
from layerwise.technique import GRADIENT_MOMENT, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout

COARSE = (64, 56, 48, 40, 32, 24)  # exponents in 64ths that are tried first
FINE = (-6, -4, -2, 2, 4, 6)  # then around the best of them
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)  # largest level over largest weight


@technique(
    paper="NUPES",
    needs={GRADIENT_MOMENT},
    menu=("bits=4,group=128", "bits=3,group=128", "bits=3,group=64,scale_bits=8,feedback=true"),
    left_out="weights and exponents trained against a block's output; exponents are searched on the weights",
)
class Nupes(Encoder):
    """Integers on a power scale, its exponent searched."""

    bits: int = option(4, minimum=3, maximum=8, help="bits per weight")
    group: int = option(128, minimum=0, help="columns that share a scale; 0 = the whole row")
    scale_bits: int = option(16, choices=(8, 16), help="bits of a stored scale")
    by_row: bool = option(False, help="an exponent for each row instead of one for the matrix")
    exponent: float = option(0.0, minimum=0, maximum=1, help="fix the exponent; 0 = search")
    clip: bool = option(True, help="search each group's largest level too")
    weighted: bool = option(True, help="weigh errors by the inputs' mean squares")
    feedback: bool = option(False, help="round against the loss, errors absorbed by later columns and rows")

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        import torch

        from layerwise.encoding.grid import check_weight, relative_importance
        from layerwise.encoding.power import Power, levels_of
        from layerwise.encoding.scales import Scales, places
        from layerwise.quantize._levels import Feedback, place

        check_weight(weight)
        columns = weight.shape[1]
        feedback = Feedback.of(weight, statistics, self.feedback)
        importance = torch.ones(columns)
        if self.weighted:
            importance = relative_importance(feedback.importance(statistics), columns)
        exponent, scale = self.search(weight.detach().float(), importance)
        scales = Scales.of(scale, self.scale_bits)
        table = levels_of(self.bits)[:, : 2**self.bits - 1][exponent.long() - 1]  # [rows or 1, levels]
        levels = scales.values()[..., None] * table[:, None]
        codes = place(weight, levels, places(self.group, columns), feedback)
        return Power.from_codes(codes, self.bits, self.group, scales, exponent)

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.encoding.power import power_layout

        return power_layout(self.bits, self.group, self.scale_bits, self.by_row, rows, columns)

    def search(self, weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """(exponents in 64ths, uint8 [rows] or [1]; largest level of each group, float32 [rows, groups])."""
        import torch

        from layerwise.encoding.power import PARTS
        from layerwise.encoding.scales import by_group

        largest = by_group(weight, self.group).abs().amax(2)
        tried = largest[..., None] * torch.tensor(CLIPS if self.clip else CLIPS[:1])
        count = len(weight) if self.by_row else 1
        best = torch.full((count,), PARTS, dtype=torch.int64)
        least = torch.full((count,), torch.inf, dtype=torch.float64)
        kept = largest.clone()

        def attempt(places: Tensor) -> None:
            """Take the exponent ``places`` [count] wherever it leaves less error."""
            nonlocal best, least, kept
            for place in places.unique().tolist():
                errors = self._errors(weight, importance, place, tried)  # [rows, groups, clips]
                error, clip = errors.min(2)
                mine = error.sum(1) if self.by_row else error.sum()[None]
                better = (mine < least) & (places == place)
                best, least = torch.where(better, place, best), torch.where(better, mine, least)
                kept = torch.where(better[:, None], tried.gather(2, clip[..., None])[..., 0], kept)

        if self.exponent:
            attempt(torch.full((count,), max(1, round(self.exponent * PARTS))))
            return best.to(torch.uint8), kept
        for place in COARSE:
            attempt(torch.full((count,), place))
        middle = best.clone()
        for offset in FINE:
            attempt((middle + offset).clamp(8, PARTS))
        return best.to(torch.uint8), kept

    def _errors(self, weight: Tensor, importance: Tensor, place: int, scales: Tensor) -> Tensor:
        import torch

        from layerwise.encoding.level_loops import scale_errors
        from layerwise.encoding.power import levels_of
        from layerwise.encoding.scales import width_of

        errors = torch.empty(scales.shape, dtype=torch.float64)
        levels = levels_of(self.bits)[place - 1, : 2**self.bits - 1].contiguous().numpy()
        width = width_of(self.group, weight.shape[1])
        values = (t.contiguous().numpy() for t in (weight, importance))
        scale_errors(*values, levels, scales.contiguous().numpy(), width, errors.numpy())
        return errors
