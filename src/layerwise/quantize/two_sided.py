"""TWO-SIDED: rounding errors are absorbed by later columns through H and by later rows through G.

    minimise tr(G D H D^T),   D = W' - W [m, n],   H = E[x x^T] [n, n],   G = E[g g^T] [m, m]

g is the gradient of the network's own loss at the output of the linear: to second order this trace is the rise of
that loss, where GPTQ's ``tr(D H D^T)`` takes every output to matter alike and alone. With unit lower triangular
``H = L_I D_I L_I^T`` and ``G = L_O D_O L_O^T`` (damped), entries are taken last column first, in it last row first,
each rounded at its weight less what has already gone wrong to its right (through L_I) and below it (through L_O).
Then ``sweeps`` visit every entry again and give it the code that is best while all others stay, and ``refits`` fit the
steps to the codes and sweep again. The formulas, and why nothing but each entry's own rounding error remains, are in
``quantize._rounding`` and ``quantize._steps``. O(m n^2 + m^2 n) a pass, a sweep or a refit.

Source: A. Tseng, Z. Sun, C. De Sa, "Model-Preserving Adaptive Rounding", arXiv 2505.22988. Choices of ours:
- dampings: G is measured from few samples, so it is damped far more than H;
- order: columns and rows of the largest curvature are rounded first, while most others can still absorb them;
- grids clip-searched with ``diag D_I``: what an own error of a column costs once the others have absorbed it;
- the sweeps and the refits of the steps, which the source does not have (``refits=0``: static grids).
On a causal LM of 5 M parameters, groups of 64, held-out KL to the dense network at 4 / 3 / 2 bits: natural order and
search by ``diag H`` 0.0028 / 0.0128 / 0.088; with ``diag D_I`` 0.0027 / 0.0122 / 0.088; largest first 0.0026 / 0.0117
/ 0.084; two sweeps 0.0024 / 0.0110 / 0.073; six sweeps 0.0024 / 0.0108 / 0.071 (GPTQ 0.0035 / 0.0158 / 0.104).

Refits, on 35 linears of a causal LM of 2.5 M parameters, sum of damages judged on other text, against none: 0.957,
0.941, 0.934, 0.926 after 1, 2, 3, 6 at 2 bits, groups of 128; 0.964, 0.954, 0.949, 0.945 at 3 bits, groups of 32;
0.978, 0.971, 0.968, 0.965 at 4 bits, groups of 64.

A site whose rows keep only their diagonal is rounded one-sided, which is what the formula gives there; one whose
columns keep only theirs (over 16 thousand inputs) is rounded to nearest.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from layerwise.roles import Encoder
from layerwise.technique import GRADIENT_MOMENT, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout
    from layerwise.encoding.grid import Grid


@technique(paper="TWO-SIDED", needs={GRADIENT_MOMENT})
class TwoSided(Encoder):
    """Rounding against the loss itself: errors absorbed along the inputs and along the outputs."""

    bits: int = option(4, minimum=2, maximum=8, help="bits per weight")
    group: int = option(64, minimum=0, help="columns that share a scale; 0 = the whole row")
    symmetric: bool = option(False, help="store no zeros")
    scale_bits: int = option(16, choices=(8, 16), help="bits of a stored scale")
    clip: bool = option(True, help="search each group's range for the least error")
    damp: float = option(0.01, minimum=0, maximum=10, help="share of mean(diag H) added to the diagonal of H")
    row_damp: float = option(0.5, minimum=0, maximum=100, help="share of mean(diag G) added to the diagonal of G")
    ordered: bool = option(True, help="round the columns and rows of the largest curvature first")
    sweeps: int = option(2, minimum=0, maximum=100, help="revisions of all codes after the first pass")
    refits: int = option(
        2, minimum=0, maximum=100, help="times that the scales are fitted to the codes, and these again"
    )

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        from layerwise.calibrate.statistics import diagonal
        from layerwise.encoding.grid import fit_grid, round_to_grid
        from layerwise.encoding.integer import GroupedInteger
        from layerwise.quantize._rounding import check_statistics, factor, revised, round_with_feedback
        from layerwise.quantize._steps import refit_steps

        check_statistics(weight, statistics)
        columns = statistics.remembered(
            ("columns", self.damp, self.ordered),
            weight.shape[1],
            lambda: factor(statistics.columns, self.damp, largest_first=self.ordered),
            source=statistics.columns,
        )
        importance = diagonal(statistics.columns) if columns is None else columns.importance()
        fitted = fit_grid(weight, self._grid(), clip=self.clip, importance=importance)
        if columns is None:
            return GroupedInteger.from_codes(round_to_grid(weight, fitted), fitted)
        rows = statistics.remembered(
            ("rows", self.row_damp, self.ordered),
            weight.shape[0],
            lambda: factor(statistics.rows, self.row_damp, largest_first=self.ordered),
        )
        codes = round_with_feedback(weight, fitted, columns, rows, sweeps=self.sweeps)
        for _ in range(self.refits):
            fitted = refit_steps(weight, codes, fitted, columns, rows)
            codes = revised(weight, codes, fitted, columns, rows, self.sweeps)
        return GroupedInteger.from_codes(codes, fitted)

    def draft(self) -> TwoSided:
        """One sweep up to 3 bits and none above: what is left out is 6 to 9 % of the damage at every width."""
        return dataclasses.replace(self, sweeps=min(self.sweeps, int(self.bits < 4)), refits=0)  # type: ignore[type-var]

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.encoding.integer import integer_layout

        return integer_layout(self._grid(), rows, columns)

    def _grid(self) -> Grid:
        from layerwise.encoding.grid import Grid

        return Grid(self.bits, self.group, self.symmetric, self.scale_bits)
