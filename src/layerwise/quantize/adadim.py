"""AdaDim: groups along the inputs of an output row, or along the outputs of an input column, whichever errs less.

    along inputs:   s, z shared by W[i, j .. j+g-1]        along outputs:   s, z shared by W[i .. i+g-1, j]
    choose          argmin over both of  tr(D H D^T),  D = round to nearest(W) - W  [m, n]

A column whose inputs are large (or whose weights are) is sensitive in every row. Along the inputs it lies in a group
of each row and sets that group's step; along the outputs it spoils only its own groups. Bits per weight are the same,
b + (16 + b) / g, where g divides both sides.

With ``feedback`` the columns are then rounded as in GPTQ, largest inputs first. Along the outputs a group never spans
columns, so a column's steps and zeros are fitted when its turn comes, to what the columns before it have made of it:

    t_j = W_j - (W' - W)[:, done] M[done, j],     (s, z) fitted to t_j,     W'_j = nearest grid point to t_j

Source: J. H. Heo et al., *Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of Large
Language Models*, arXiv 2309.15531, and its public code. The paper compares the outputs of the module around a linear;
we compare the linear's own output on the second moment, which is exact for squared error. Choices of ours: ranges are
clip-searched; the room of a stored form must not depend on the choice, so a tensor is as long as the longer direction
needs, and where that would take more than ``ROOM`` of the bytes along the inputs, they are kept along the inputs.

Measured on the seven linears of a block of a small language model, groups of 32: v, gate and up choose the outputs, q,
k, o and down the inputs, and the held-out error is 0.95, 0.94 and 0.92 of GPTQ's at 4, 3 and 2 bits, in a little fewer
bytes. With feedback the outputs everywhere do better still (0.93, 0.93, 0.91): rounding to nearest, which the paper
lets choose, is not what is stored.
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
    from layerwise.encoding.integer import GroupedInteger
    from layerwise.quantize._rounding import Side

ROOM = 1.02  # of the bytes along the inputs: what a form with room for either direction may take


@technique(
    paper="AdaDim",
    needs={SECOND_MOMENT},
    menu=("bits=4,group=64", "bits=4,group=32", "bits=3,group=64", "bits=3,group=32", "bits=2,group=64",
          "bits=2,group=32"),
)  # fmt: skip
class Adadim(Encoder):
    """Group along the inputs or the outputs, chosen per matrix by the error of its output."""

    bits: int = option(4, minimum=2, maximum=8, help="bits per weight")
    group: int = option(64, minimum=0, help="weights that share a scale; 0 = the whole row or column")
    along: str = option("best", choices=("best", "inputs", "outputs"), help="direction of the groups")
    feedback: bool = option(True, help="let later columns absorb the error of earlier ones, as in GPTQ")
    clip: bool = option(True, help="search each group's range for the least error")
    damp: float = option(0.01, minimum=0, maximum=10, help="share of mean(diag H) added to the diagonal")

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        from layerwise.encoding.directed import Directed
        from layerwise.quantize._rounding import check_statistics

        check_statistics(weight, statistics)
        moment = statistics.inputs
        either = self._either(*weight.shape)
        along = "inputs" if self.along == "best" else self.along
        if either:
            along = self.choose(weight, moment)
        whole = moment if self.feedback else moment.diagonal() if moment.dim() == 2 else moment
        inner = self._along_inputs(weight, whole) if along == "inputs" else self._along_outputs(weight, whole)
        return inner if not either and along == "inputs" else Directed(inner, along, either)

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.encoding.directed import directed_layout
        from layerwise.encoding.integer import integer_layout

        if self._either(rows, columns):
            return directed_layout(self._grid(), rows, columns, "inputs", True)
        if self.along == "outputs":
            return directed_layout(self._grid(), rows, columns, "outputs", False)
        return integer_layout(self._grid(), rows, columns)

    def choose(self, weight: Tensor, moment: Tensor) -> str:
        """``inputs`` or ``outputs``: the direction in which rounding to nearest leaves the smaller output error."""
        squares = moment.diagonal() if moment.dim() == 2 else moment
        errors = {
            "inputs": self._along_inputs(weight, squares).decode() - weight,
            "outputs": self._along_outputs(weight, squares).decode().T - weight,
        }
        return min(errors, key=lambda along: output_error(errors[along], moment))

    def _along_inputs(self, weight: Tensor, moment: Tensor) -> GroupedInteger:
        """The integers of the matrix; plain rounding where only ``diag H`` is given."""
        from layerwise.quantize._rounding import one_sided

        return one_sided(weight, moment, self._grid(), clip=self.clip, damp=self.damp, act_order=True)

    def _along_outputs(self, weight: Tensor, moment: Tensor) -> GroupedInteger:
        """The integers of the transpose; within one column all weights meet the same input, so none matters more."""
        from layerwise.encoding.grid import fit_grid, round_to_grid
        from layerwise.encoding.integer import GroupedInteger
        from layerwise.quantize._rounding import factor

        turned = weight.T.contiguous()
        columns = factor(moment, self.damp, largest_first=True)
        if columns is not None:
            turned = self._targets(turned, columns)
        fitted = fit_grid(turned, self._grid(), clip=self.clip)
        return GroupedInteger.from_codes(round_to_grid(turned, fitted), fitted)

    def _targets(self, turned: Tensor, side: Side) -> Tensor:
        """What each column is to be rounded from, float32 [n, m], once it has absorbed the errors before it.

        Rounding a target again gives the same grid and codes, since a group's grid depends on its own column alone.
        """
        import torch

        from layerwise.encoding.grid import fit_grid, points, round_to_grid
        from layerwise.quantize._rounding import BLOCK

        given = turned.float()[side.order]
        targets, change = torch.empty_like(given), torch.zeros(given.shape, dtype=torch.float64)
        for first in range((len(given) - 1) // BLOCK * BLOCK, -1, -BLOCK):
            last = min(first + BLOCK, len(given))
            carried = side.upper[first:last, last:] @ change[last:]
            for j in range(last - 1, first - 1, -1):
                inside = side.upper[j, j + 1 : last] @ change[j + 1 : last]
                target = (given[j].double() - carried[j - first] - inside).float()[None]
                fitted = fit_grid(target, self._grid(), clip=self.clip)
                targets[j] = target[0]
                change[j] = points(round_to_grid(target, fitted), fitted)[0].double() - given[j].double()
        return torch.empty_like(targets).index_copy_(0, side.order, targets)

    def _either(self, rows: int, columns: int) -> bool:
        """Whether the direction is chosen: it was left open, and a form with room for either is hardly larger."""
        from layerwise.encoding.directed import directed_layout
        from layerwise.encoding.encoded import layout_bytes
        from layerwise.encoding.integer import integer_layout

        room = layout_bytes(directed_layout(self._grid(), rows, columns, "inputs", True))
        return self.along == "best" and room <= ROOM * layout_bytes(integer_layout(self._grid(), rows, columns))

    def _grid(self) -> Grid:
        from layerwise.encoding.grid import Grid

        return Grid(self.bits, self.group)


def output_error(change: Tensor, moment: Tensor) -> float:
    """``tr(D H D^T)``."""
    product = change * moment if moment.dim() == 1 else change @ moment
    return float((product.double() * change.double()).sum())
