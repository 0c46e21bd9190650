"""High-impact ratio: a share of the columns at more bits, the rest at few, rounded with feedback, the share first.

    impact    c_j = H_jj sum_i (w_ij - Q_low(w_ij))^2        Q_low: rounding to the low width in groups
    high      the ``share * n`` columns of the largest c_j, at ``high`` bits; the others at ``bits`` bits

Columns are rounded as in GPTQ, the high ones before the low ones (within each, largest inputs first), so that the
many low columns absorb what the few leave over. Groups are cut within each part; bits per weight are the two widths'
``b + (16 + b) / g`` in their shares, and ``1 / m`` for the bit map of the columns.

Source: *Layer-Wise High-Impact Parameter Ratio Optimization in Post-Training Quantization for Large Language Models*,
arXiv 2511.17801, of which the abstract fixes the outline: keep the weights of high impact at a moderate width such as 4
bits instead of 16, so that more of them can be kept, and choose each layer's share by a quadratic program. The program
is an allocator's; here the share is an option. Choices of ours: the impact score above; whole columns instead of
entries, whose mask would cost more than 0.2 bits a weight; the share rounded to multiples of 8 columns; the expensive
quantizer for the high part is GPTQ with clip search, as for the rest, and a tuner may follow.

Measured on the seven linears of a block of a small language model, held-out output error: a fifth at 4 and the rest at
2 bits, groups of 32, leave 0.84 of GPTQ's at 2 bits and groups of 16, in as many bytes (3.11 bits a weight); a little
above, at 3.23, GPTQ at 3 bits leaves less than half of what 40 % at 4 and 60 % at 2 bits leave.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.errors import InputError
from layerwise.roles import Encoder
from layerwise.technique import SECOND_MOMENT, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout
    from layerwise.encoding.mixed import Groups

MULTIPLE = 8  # columns: runs of bits are then whole bytes


@technique(
    paper="Layer-wise high-impact ratio PTQ",
    needs={SECOND_MOMENT},
    menu=(
        "bits=2,share=0.1", "bits=2,share=0.2,group=32", "bits=2,share=0.4", "bits=3,share=0.1,high=5",
        "bits=3,share=0.3,high=5,group=32", "bits=4,share=0.1,high=6", "bits=4,share=0.3,high=6,group=32",
    ),
)  # fmt: skip
class HighImpact(Encoder):
    """Give a share of the columns, those whose rounding would hurt most, a greater width."""

    bits: int = option(2, minimum=1, maximum=8, help="bits of most columns")
    high: int = option(4, minimum=1, maximum=8, help="bits of the columns of high impact")
    share: float = option(0.1, minimum=0, maximum=1, help="share of the columns that is of high impact")
    group: int = option(64, minimum=0, help="columns that share a scale; 0 = all of a row's part")
    damp: float = option(0.01, minimum=0, maximum=10, help="share of mean(diag H) added to the diagonal")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high < self.bits:
            raise InputError(f"columns of high impact have at least the {self.bits} bits of the others")

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        import torch

        from layerwise.calibrate.statistics import diagonal
        from layerwise.encoding.grid import check_weight
        from layerwise.quantize._mixed import fit_mixed, round_mixed_groups
        from layerwise.quantize._rounding import check_statistics, factor

        check_weight(weight)
        check_statistics(weight, statistics)
        squares = diagonal(statistics.inputs)
        chosen = self.chosen(weight, squares)
        groups = self._groups(weight.shape[1], chosen)
        scale, zero = fit_mixed(weight, groups, squares)
        order = torch.argsort(squares, stable=True)
        order = torch.cat([order[~chosen[order]], order[chosen[order]]])  # the last is rounded first
        side = factor(statistics.inputs, self.damp, order=order)
        return round_mixed_groups(weight, groups, scale, zero, side)

    def layout(self, rows: int, columns: int) -> Layout:
        import torch

        from layerwise.encoding.mixed import mixed_layout

        count = self.count(columns)
        groups = self._groups(columns, torch.arange(columns) < count)
        named = 0 if groups.first is None else count
        return mixed_layout(rows, columns, groups.size, named, groups.bits.tolist())

    def count(self, columns: int) -> int:
        """Columns at the high width."""
        return min(columns, round(self.share * columns / MULTIPLE) * MULTIPLE) if self.share < 1 else columns

    def chosen(self, weight: Tensor, squares: Tensor) -> Tensor:
        """The columns of high impact, the first of equals: bool [columns]."""
        import torch

        groups = self._groups(weight.shape[1], torch.zeros(weight.shape[1], dtype=torch.bool))
        order = torch.argsort(self.impact(weight, squares, groups), descending=True, stable=True)
        chosen = torch.zeros(weight.shape[1], dtype=torch.bool)
        chosen[order[: self.count(weight.shape[1])]] = True
        return chosen

    def impact(self, weight: Tensor, squares: Tensor, low: Groups) -> Tensor:
        """``c_j`` of the formula above, float64 [columns]; ``low`` is the whole matrix at the low width."""
        from layerwise.quantize._mixed import fit_mixed, round_mixed_groups

        rounded = round_mixed_groups(weight, low, *fit_mixed(weight, low, squares), None).decode()
        return (rounded - weight).double().square().sum(0) * squares.double().clamp(min=0)

    def _groups(self, columns: int, chosen: Tensor) -> Groups:
        """High columns first; a matrix that is all high or all low needs no bit map."""
        import torch

        from layerwise.encoding.mixed import Groups, group_widths

        count, size = int(chosen.sum()), min(self.group, columns)
        if count in (0, columns):
            width = self.high if count else self.bits
            return Groups(columns, size, torch.full((len(group_widths(columns, size, 0)),), width))
        high = len(group_widths(count, size, 0))
        low = len(group_widths(columns, size, count)) - high
        return Groups(columns, size, torch.tensor([self.high] * high + [self.bits] * low), chosen)
