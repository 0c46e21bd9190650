"""NF4: round to the nearest of 16 normal quantiles, times the largest weight of the group.

    w' = s q,   s = max |w| of a group of g columns,   q in NF4 = {quantiles of N(0, 1) over the largest, and 0}

NF4 has eight levels above zero and seven below, equally likely for normally distributed weights. bits per weight =
4 + 16 / g, or 4 + 8 / g + 16 / n with ``scale_bits = 8``.

Source: T. Dettmers et al., *QLoRA*, arXiv 2305.14314, whose study beside FP4 and INT8 is arXiv 2309.05210. Choices of
ours: groups lie inside rows (theirs run over the flattened weight, across row ends), so rows can be looked up alone;
scales are fp16, or 8 bits with one fp16 factor a row in place of their 8 bits around a mean in blocks of 256; the
scale is searched (``search``, 21 factors from 1 to 0.6) for the least ``sum_j H_jj (w_j - w'_j)^2``, where theirs is
always the largest weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Encoder
from layerwise.technique import INPUT_SQUARES, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout


@technique(
    paper="PTQ hyperparameter study (nf4/fp4/int8)",
    left_out="speed and memory of its GPU library, and networks of billions of parameters",
    needs={INPUT_SQUARES},
    menu=("group=128,scale_bits=8", "group=64,scale_bits=8", "group=32,scale_bits=8", "group=16,scale_bits=8"),
)
class Nf4(Encoder):
    """Four bits on the quantiles of the normal distribution, scaled per group."""

    group: int = option(64, minimum=0, help="columns that share a scale; 0 = the whole row")
    scale_bits: int = option(16, choices=(8, 16), help="bits of a stored scale")
    search: bool = option(True, help="search each group's scale for the least error")

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        from layerwise.calibrate.statistics import diagonal
        from layerwise.encoding.codebook import Codebook, fit_codebook, nearest_levels
        from layerwise.quantize._rounding import check_statistics

        check_statistics(weight, statistics)
        importance = diagonal(statistics.inputs)
        fitted = fit_codebook(weight, "nf4", self.group, self.scale_bits, search=self.search, importance=importance)
        return Codebook.from_codes(nearest_levels(weight, "nf4", fitted), "nf4", fitted)

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.encoding.codebook import codebook_layout

        return codebook_layout(self.group, self.scale_bits, rows, columns)
