"""FireQ: 4-bit integers whose group steps are 8-bit floats, guarded against underflow by one power of two.

    w' = 2^-i e4m3(c) (q - 8),   q in 0..15,   c = E4M3 of  2^i max(max / 7, -min / 8)  of a group of g columns

A kernel turns the 16 values ``e4m3(c) (q - 8)`` of a group into an 8-bit float table and multiplies in 8 bits. Weights
of trained networks are small, and steps fall off E4M3's lower end (2^-9); the matrix is therefore taken times the
power of two at which the groups fall off least (``encoding.float8`` has the rule), which the product's scale gives
back. bits per weight = 4 + 8 / g, half of what fp16 steps add.

Source: *FireQ: Fast INT4-FP8 Kernel and RoPE-aware Quantization for LLM Inference Acceleration*, arXiv 2505.20839, and
its public code. Choices of ours: all 16 codes are used where theirs leaves -8 out (step absmax / 7); steps are rounded
up, so that none cuts its group's largest weight off; the range is searched (``search``, 32 factors) for the least
``sum_j H_jj (w_j - w'_j)^2``; other widths than 4 bits are allowed, because small steps let groups be small.
``guard=false`` leaves i at 0, for comparison. The channel-wise scaling of the paper is the rewrite ``awq``
(``awq+fireq``). What is left out: its scales inside attention act on the stored keys and values at run time, and its
pipelining belongs to one kind of accelerator.

Measured on a small language model (its evidence): the cheap steps do not make up for the symmetric grid. At 4 bits it
is level with asymmetric rounding in as many bytes, at 3 bits between its groups of 64 and whole rows, at 2 bits behind;
the format is worth its bytes for what the kernel gains, not for quality.
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


@technique(
    paper="FireQ",
    needs={INPUT_SQUARES},
    menu=("bits=4,group=128", "bits=4,group=32", "bits=3,group=64", "bits=3,group=32", "bits=2,group=32"),
    left_out="the FP8 kernel and the scaling behind the rotary positions",
)
class Fireq(Encoder):
    """Integers with 8-bit float steps and a power of two that keeps them from underflowing."""

    bits: int = option(4, minimum=2, maximum=8, help="bits per weight")
    group: int = option(128, minimum=0, help="columns that share a scale; 0 = the whole row")
    search: bool = option(True, help="search each group's range for the least error")
    guard: bool = option(True, help="choose the power of two that keeps steps from underflowing")

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        import torch

        from layerwise.calibrate.statistics import diagonal
        from layerwise.encoding.grid import fit_grid, round_to_grid
        from layerwise.encoding.integer import GroupedInteger
        from layerwise.quantize._rounding import check_statistics

        check_statistics(weight, statistics)
        importance = diagonal(statistics.inputs)
        power = None if self.guard else torch.ones(1, dtype=torch.float16)
        fitted = fit_grid(weight, self._grid(), clip=self.search, importance=importance, power=power)
        return GroupedInteger.from_codes(round_to_grid(weight, fitted), fitted)

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.encoding.integer import integer_layout

        return integer_layout(self._grid(), rows, columns)

    def _grid(self) -> Grid:
        from layerwise.encoding.grid import Grid

        return Grid(self.bits, self.group, symmetric=True, scale_bits=8, float_scale=True)
