"""Fitting and rounding where every group of columns has its own width; see ``encoding.mixed``.

Grids of two bits and more are those of ``encoding.grid``, fitted to all groups of one width together. One bit is the
pair ``-a, a`` with ``a = sum h |w| / sum h`` over the group, which leaves the least ``sum h (w - w')^2``; a group of
zeros is the pair ``0, 1``. Rounding is that of GPTQ (``_rounding`` has the algebra), each column on its own grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from layerwise.encoding.grid import LARGEST_STEP, SMALLEST_STEP, FittedGrid, Grid, check_weight, fit_grid, row_pieces
from layerwise.encoding.mixed import Groups, Mixed, real_zeros
from layerwise.errors import InputError
from layerwise.quantize._rounding import BLOCK, Side

Fit = Callable[[Tensor, Grid, Tensor], FittedGrid]
"""(weight [m, k], grid, the columns' places [k]) -> grid of these columns."""


def fit_mixed(weight: Tensor, groups: Groups, importance: Tensor, fit: Fit | None = None) -> tuple[Tensor, Tensor]:
    """Stored steps fp16 and zeros uint8 [m, groups] for ``weight`` [m, n], columns in their own order.

    importance: [n], what a squared error of each column costs. fit: of the groups of two bits and more; the
    clip-searched grids of ``fit_grid`` if None.
    """
    check_weight(weight)
    scale = torch.empty(weight.shape[0], len(groups.bits), dtype=torch.float16)
    zero = torch.empty(scale.shape, dtype=torch.uint8)
    for bits, members in runs_of_one_width(groups):
        places = groups.order[torch.isin(groups.of, members)]
        part, size = weight[:, places], int(max(groups.widths[int(g)] for g in members))
        if bits == 1:
            scale[:, members], zero[:, members] = binary(part.float(), size, importance[places])
            continue
        grid = Grid(bits, size)
        fitted = fit(part, grid, places) if fit else fit_grid(part, grid, clip=True, importance=importance[places])
        assert fitted.zero is not None
        scale[:, members], zero[:, members] = fitted.scale, fitted.zero
    return scale, zero


def runs_of_one_width(groups: Groups) -> Iterator[tuple[int, Tensor]]:
    """(bits, groups of that width) for each width in each part; only the last group of each may be short."""
    last = 0 if groups.first is None else int(groups.first.sum())
    starts = torch.tensor(groups.widths).cumsum(0) - torch.tensor(groups.widths)
    for part in (starts < last, starts >= last):
        for bits in groups.bits[part].unique().tolist():
            yield bits, (part & (groups.bits == bits)).nonzero()[:, 0]


def binary(weight: Tensor, size: int, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Steps ``2 a`` fp16 and zeros uint8 of groups of ``size`` columns in one bit: [m, groups] each."""
    pieces = zip(weight.split(size, 1), importance.clamp(min=0).split(size), strict=True)
    steps = []
    for part, given in pieces:
        h = given / given.mean() if float(given.mean()) > 0 else torch.ones_like(given)
        steps.append(2 * (part.abs() * h).sum(1) / h.sum())
    step = torch.stack(steps, 1)
    if float(step.max()) > LARGEST_STEP:
        raise InputError(f"a group of weights would need a step of {float(step.max()):.3g}, above {LARGEST_STEP:g}")
    nothing = step == 0
    return step.clamp(SMALLEST_STEP, LARGEST_STEP).masked_fill(nothing, 1.0).half(), (~nothing).to(torch.uint8)


def round_mixed_groups(weight: Tensor, groups: Groups, scale: Tensor, zero: Tensor, side: Side | None) -> Mixed:
    """``weight`` [m, n] on grids fitted beforehand; columns absorb errors in the order of ``side``, if there is one."""
    from layerwise.encoding.mixed_loops import round_mixed

    columns = weight.shape[1]
    order = torch.arange(columns) if side is None else side.order
    group_of = torch.empty(columns, dtype=torch.int64).index_copy_(0, groups.order, groups.of)[order].numpy()
    top = (2.0 ** groups.bits.double() - 1).numpy()
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for rows in row_pieces(*weight.shape):
        part = weight[rows].detach().float().T[order].contiguous()  # [n, rows]
        steps = scale[rows].float().T.contiguous().numpy()
        zeros = real_zeros(zero[rows], groups).T.contiguous().numpy()
        done, change = torch.empty(part.shape, dtype=torch.uint8), torch.zeros(part.shape, dtype=torch.float64)
        for first in range((columns - 1) // BLOCK * BLOCK, -1, -BLOCK):
            last = min(first + BLOCK, columns)
            if side is None:
                carried, own = torch.zeros(last - first, part.shape[1]).double(), torch.eye(last - first).double()
            else:
                carried, own = side.upper[first:last, last:] @ change[last:], side.lower[first:last, first:last]
            round_mixed(
                part.numpy(), steps, zeros, top, group_of, own.contiguous().numpy(), first, carried.numpy(),
                done.numpy(), change.numpy(),
            )  # fmt: skip
        codes[rows, order] = done.T
    return Mixed.from_codes(codes[:, groups.order], scale, zero, groups)
