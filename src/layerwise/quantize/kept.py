"""The grid that a weight lies on already: what another tool has quantized, stored again without a new rounding.

    w_j = s k_j for the columns j of a group,   k_j whole,   s of fp16

A group's weights are whole multiples of 2^-24 (the smallest number of fp16), so the greatest common divisor of their
multiples is ``c s``, ``c`` the greatest common divisor of the ``k_j``. The step is that divisor over the smallest
``d = 1, 2, ..`` that makes it a number of fp16; it is no smaller than ``s``, so the multiples fit wherever the ``k_j``
did. Zeros are the smallest that leave no code below 0. The decoded weight is the given one, bit for bit; codes may be
others than those that it came with, where a group uses few levels.

A group that lies on no such grid is rounded to the nearest point of one fitted to its range, as by ``rtn`` without the
clip search. This is for networks that were quantized before (``network/stored.py``): there it is a candidate at every
site that has an encoding of this kind, which changes nothing.

Source: none needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Encoder
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout
    from layerwise.encoding.grid import Grid

MOST = 256  # divisors tried: the largest multiple of a step that one level can be


@technique(paper="baseline")
class Kept(Encoder):
    """Find the grid that the weights lie on; round where they lie on none."""

    bits: int = option(4, minimum=2, maximum=8, help="bits per weight")
    group: int = option(64, minimum=0, help="columns that share a scale; 0 = the whole row")
    symmetric: bool = option(False, help="store no zeros")

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        import torch

        from layerwise.encoding.grid import FittedGrid, fit_grid, round_to_grid, row_pieces
        from layerwise.encoding.integer import GroupedInteger

        grid = self._grid()
        fitted = fit_grid(weight, grid)
        scale, zero = fitted.scale.clone(), None if fitted.zero is None else fitted.zero.clone()
        for rows in row_pieces(*weight.shape):
            step, low, exact = common_steps(weight[rows].detach().float(), grid)
            scale[rows] = torch.where(exact, step, scale[rows])
            if zero is not None:
                zero[rows] = torch.where(exact, (-low).clamp(min=0).to(torch.uint8), zero[rows])
        found = FittedGrid(grid, weight.shape[1], scale, None, zero)
        return GroupedInteger.from_codes(round_to_grid(weight, found), found)

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.encoding.integer import integer_layout

        return integer_layout(self._grid(), rows, columns)

    def _grid(self) -> Grid:
        from layerwise.encoding.grid import Grid

        return Grid(self.bits, self.group, self.symmetric)


def common_steps(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """(steps fp16, lowest multiple int64, whether all of the group lies on the grid), each [rows, groups]."""
    import numpy as np
    import torch

    from layerwise.encoding.grid import LARGEST_STEP, SMALLEST_STEP
    from layerwise.encoding.scales import by_group

    parts = by_group(weight, grid.group).double() / SMALLEST_STEP  # the padding of a short group is zero
    fits = ((parts == parts.round()) & (parts.abs() < 2.0**52)).all(-1)
    whole = torch.where(fits[..., None], parts, 0.0).long()
    divisor = torch.from_numpy(np.gcd.reduce(whole.numpy(), axis=-1))
    step = torch.ones(divisor.shape, dtype=torch.float64)
    open_ = divisor > 0
    for d in range(1, MOST):
        value = divisor.double() * SMALLEST_STEP / d
        half = value.half().double()
        found = open_ & (half == value) & (value <= LARGEST_STEP)
        step[found], open_ = value[found], open_ & ~found
        if not bool(open_.any()):
            break
    multiples = (whole.double() * SMALLEST_STEP / step[..., None]).round().long()
    low, high = multiples.amin(-1).clamp(max=0), multiples.amax(-1).clamp(min=0)
    if grid.symmetric:
        room = (low >= -grid.middle) & (high < grid.middle)
    else:
        room = high - low <= grid.top
    return step.half(), low, fits & ~open_ & room
