"""FP4: round to the nearest 4-bit float, times a scale of the group.

    w' = s q,   q in ±{0, 0.5, 1, 1.5, 2, 3, 4, 6} (``e2m1``),   s = max |w| / 6 of a group of g columns

``levels=fp4`` takes the table of the library bitsandbytes, ±{0, 0.0625, 2, 3, 4, 6, 8, 12} / 12, which the study
measured: e2m1 but for its smallest level, so close to zero that it is all but lost. Fifteen of the 16 codes are in use.
bits per weight = 4 + 16 / g, or 4 + 8 / g + 16 / n with ``scale_bits = 8``.

Source: arXiv 2309.05210 (the study, of the library's table); OCP Microscaling Formats 1.0 (e2m1). Choices of ours:
e2m1 by default, since it leaves less error (a test holds it); scales are fp16 or 8 bits with an fp16 factor a row, not
the powers of two of the microscaling formats; groups lie inside rows; the scale is searched (``search``, 21 factors
from 1 to 0.6) for the least ``sum_j H_jj (w_j - w'_j)^2``.
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
    menu=("group=64,scale_bits=8", "group=32,scale_bits=8", "group=16,scale_bits=8"),
)
class Fp4(Encoder):
    """Four-bit floats, scaled per group: the format that recent accelerators multiply in."""

    levels: str = option("e2m1", choices=("e2m1", "fp4"), help="e2m1, or the library's fp4 of the study")
    group: int = option(32, minimum=0, help="columns that share a scale; 0 = the whole row")
    scale_bits: int = option(16, choices=(8, 16), help="bits of a stored scale")
    search: bool = option(True, help="search each group's scale for the least error")

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        from layerwise.calibrate.statistics import diagonal
        from layerwise.encoding.codebook import Codebook, fit_codebook, nearest_levels
        from layerwise.quantize._rounding import check_statistics

        check_statistics(weight, statistics)
        importance = diagonal(statistics.inputs)
        fitted = fit_codebook(
            weight, self.levels, self.group, self.scale_bits, search=self.search, importance=importance
        )
        return Codebook.from_codes(nearest_levels(weight, self.levels, fitted), self.levels, fitted)

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.encoding.codebook import codebook_layout

        return codebook_layout(self.group, self.scale_bits, rows, columns)
