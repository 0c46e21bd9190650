"""Round to nearest: every weight to the nearest point of its group's grid.

    W [m, n], groups of g columns, step s and zero z per group:  q = clip(round(w / s) + z, 0, 2^b - 1),  w' = s (q - z)

    bits per weight = b + (16 + b) / g asymmetric, b + 16 / g symmetric

Without the clip search ``|w - w'| <= s / 2`` for every weight. The search (the default) shrinks each group's range to
the factor that leaves the least ``sum_j H_jj (w_j - w'_j)^2``, ``H_jj`` the mean square of input j where statistics
know it. It costs one extra pass; grids are described in ``encoding.grid``.

Source: B. Jacob et al., arXiv 1712.05877 (the grid); M. Nagel et al., arXiv 2106.08295 (clipping). Left open there: how
ranges are searched (ours: 32 factors from 1 to 0.38, both ends together, weighted by the inputs' mean squares).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Encoder
from layerwise.technique import INPUT_SQUARES, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout
    from layerwise.encoding.grid import Grid


@technique(paper="RTN", needs={INPUT_SQUARES})
class Rtn(Encoder):
    """Round every weight to the nearest point of its group's grid; the floor that others must beat."""

    bits: int = option(4, minimum=2, maximum=8, help="bits per weight")
    group: int = option(64, minimum=0, help="columns that share a scale; 0 = the whole row")
    symmetric: bool = option(False, help="store no zeros")
    scale_bits: int = option(16, choices=(8, 16), help="bits of a stored scale")
    clip: bool = option(True, help="search each group's range for the least error")

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        from layerwise.calibrate.statistics import diagonal
        from layerwise.encoding.grid import fit_grid, round_to_grid
        from layerwise.encoding.integer import GroupedInteger
        from layerwise.quantize._rounding import check_statistics

        check_statistics(weight, statistics)
        fitted = fit_grid(weight, self._grid(), clip=self.clip, importance=diagonal(statistics.inputs))
        return GroupedInteger.from_codes(round_to_grid(weight, fitted), fitted)

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.encoding.integer import integer_layout

        return integer_layout(self._grid(), rows, columns)

    def _grid(self) -> Grid:
        from layerwise.encoding.grid import Grid

        return Grid(self.bits, self.group, self.symmetric, self.scale_bits)
