"""GWQ: the few weights with the largest gradients stay in fp16, the rest are rounded to nearest.

    kept = the round(share * m * n) entries with the largest E|M_ij|,      M = sum_t g_t x_t^T  [m, n]

M is the gradient of one text's loss at the matrix; magnitudes are averaged over texts, since at a trained network the
signed gradients average to zero. Each group's range is that of the entries that are not kept (a kept entry counts as
zero, which every range contains), so the kept ones pay twice: they are exact, and the others get a finer step.

    bits per weight = b + (16 + b) / g + 32 share + 16 / n,    see ``encoding.scattered``

With ``share=0`` it is round to nearest bit for bit; with ``share=1`` it is the matrix in fp16.

Source: Y. Shao et al., arXiv 2411.00850. Left open there: where positions are stored (ours: 16-bit columns, row after
row) and the group. Choices of ours: the gradients are those of texts' sampled labels, four draws of each token from the
network's own prediction, which the reverse pass carries anyway. Where a network is calibrated its text's real next
tokens are such a draw, so the magnitudes have the same mean; more draws and more texts than the paper's one only make
them less noisy. Ties go to the entry that comes first. Where the gradient at each weight is not known (tables, heads,
experts that no token reached) the root of the product of its marginals' diagonals stands in, ``sqrt(R_ii C_jj)``, which
is exact up to a factor where ``M`` varies by rows and columns independently.

Measured (docs-lm, ``layerwise bench gwq``): the kept 1 % lower the KL at 3 bits, groups of 64, from 0.0866 to 0.0826
and cost 9 % more bytes. Round to nearest spends those better: 0.0350 when widths and groups are planned within as many
bytes, 0.0292 as a uniform setting a little larger. The same holds at 4 and 2 bits: a negative result on that network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.errors import InputError
from layerwise.roles import Encoder
from layerwise.technique import INPUT_SQUARES, WEIGHT_GRADIENT, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout
    from layerwise.encoding.grid import Grid


@technique(
    paper="GWQ",
    needs={INPUT_SQUARES, WEIGHT_GRADIENT},
    left_out="one threshold for the whole network",
)
class Gwq(Encoder):
    """Round to nearest beside the weights with the largest gradients, which are kept."""

    bits: int = option(4, minimum=2, maximum=8, help="bits per weight that is not kept")
    group: int = option(64, minimum=0, help="columns that share a scale; 0 = the whole row")
    symmetric: bool = option(False, help="store no zeros")
    scale_bits: int = option(16, choices=(8, 16), help="bits of a stored scale")
    clip: bool = option(True, help="search each group's range for the least error")
    share: float = option(0.01, minimum=0, maximum=1, help="share of the weights that are kept in fp16")

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        from layerwise.calibrate.statistics import diagonal
        from layerwise.encoding.grid import check_weight, fit_grid, round_to_grid
        from layerwise.encoding.integer import GroupedInteger
        from layerwise.encoding.scattered import Scattered
        from layerwise.quantize._rounding import check_statistics

        check_weight(weight)
        check_statistics(weight, statistics)
        count = self.count(*weight.shape)
        kept = largest_entries(magnitude(statistics, weight), count)
        rest = weight.masked_fill(kept, 0.0)
        fitted = fit_grid(rest, self._grid(), clip=self.clip, importance=diagonal(statistics.inputs))
        integers = GroupedInteger.from_codes(round_to_grid(rest, fitted), fitted)
        return Scattered.of(weight, kept, integers) if count else integers

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.encoding.integer import integer_layout
        from layerwise.encoding.scattered import scattered_layout

        count = self.count(rows, columns)
        if not count:
            return integer_layout(self._grid(), rows, columns)
        return scattered_layout(self._grid(), rows, columns, count)

    def count(self, rows: int, columns: int) -> int:
        """How many entries of a matrix of this shape are kept."""
        return round(self.share * rows * columns)

    def _grid(self) -> Grid:
        from layerwise.encoding.grid import Grid

        return Grid(self.bits, self.group, self.symmetric, self.scale_bits)


def magnitude(statistics: SiteStatistics, weight: Tensor) -> Tensor:
    """Size of the gradient at each weight, float32 ``[m, n]``; raises ``InputError`` for one of another shape."""
    from layerwise.calibrate.statistics import diagonal

    known = statistics.gradient
    if known is None:
        rows, columns = (diagonal(side).clamp(min=0).sqrt() for side in (statistics.rows, statistics.columns))
        return rows[:, None] * columns[None, :]
    if known.shape != weight.shape or not bool(known.isfinite().all()):
        raise InputError(
            f"the gradient at a {list(weight.shape)} weight has shape {list(known.shape)} or is not finite"
        )
    return known


def largest_entries(values: Tensor, count: int) -> Tensor:
    """A mask of exactly ``count`` of the largest values; of equal ones those that come first."""
    import torch

    flat = values.flatten()
    if not count:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = flat.topk(count).values[-1]
    kept = flat > threshold
    tied = (flat == threshold).nonzero().flatten()
    kept[tied[: count - int(kept.sum())]] = True
    return kept.view(values.shape)
