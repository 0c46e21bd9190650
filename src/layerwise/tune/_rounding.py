"""A grouped integer form as a differentiable function of rounding offsets and range factors; see ``tune.signround``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from layerwise.encoding.encoded import Encoded
from layerwise.encoding.grid import LARGEST_STEP, SMALLEST_STEP, FittedGrid
from layerwise.encoding.integer import GroupedInteger

HALF = 0.5  # levels that an offset may move a weight by
EDGE = 0.499  # levels from a code to the rim of its cell
FACTORS = (0.5, 1.2)  # of an end of a group's range


class _Through(torch.autograd.Function):
    """``rounded`` in the forward pass, the identity in ``value`` in the backward pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def through(value: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, with the gradient of ``value``."""
    return _Through.apply(value, rounded.detach())  # type: ignore[no-any-return, no-untyped-call]


def draws(parts: int, steps: int, seed: int) -> Iterator[int]:
    """A part for each step: every part once in a random order, then again in another."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(parts, generator=generator).tolist()
        yield order.pop()


class Offsets:
    """The learned state of one linear: V [out, in] and the factors [out, groups] of both ends of each range."""

    def __init__(self, form: Encoded, weight: Tensor, ranges: bool) -> None:
        assert isinstance(form, GroupedInteger)
        self.fitted, self.grid = form.fitted, form.grid
        self.steps, self.zeros = self.fitted.steps(), self.fitted.zeros()
        self.base = cell_values(form, weight)
        self.offset = torch.zeros_like(self.base, requires_grad=True)
        self.upper = torch.ones_like(self.steps, requires_grad=ranges)
        self.lower = torch.ones_like(self.steps, requires_grad=ranges and not self.grid.symmetric)

    # ------------------------------------------------------------ the form as a function

    def ranges(self) -> tuple[Tensor, Tensor]:
        """Steps and zeros [out, groups] under the factors, each what will be stored."""
        top = float(self.grid.top)
        if self.grid.symmetric:
            return stored_steps(self.steps * self.upper, self.fitted), self.zeros
        share = (self.upper * (top - self.zeros) + self.lower * self.zeros) / top
        steps = stored_steps(self.steps * share, self.fitted)
        zeros = self.lower * self.zeros / share
        rounded = zeros.half().float() if self.grid.float_zero else zeros.round().clamp(0, top)
        return steps, through(zeros, rounded)

    def codes(self, steps: Tensor, zeros: Tensor) -> Tensor:
        """Codes as float32 [out, in]; ``steps`` and ``zeros`` [out, in]."""
        levels = self.base / steps + zeros + self.offset
        return through(levels, levels.round()).clamp(0, self.grid.top)

    def weight(self) -> Tensor:
        """W' [out, in]: bit for bit what ``encoded().decode()`` is."""
        steps, zeros = (spread(side, self.fitted) for side in self.ranges())
        return (self.codes(steps, zeros) - zeros) * steps

    @torch.no_grad()
    def encoded(self) -> GroupedInteger:
        """The state as it is stored."""
        steps, zeros = self.ranges()
        codes = self.codes(spread(steps, self.fitted), spread(zeros, self.fitted)).to(torch.uint8)
        factor, zero = self.fitted.factor, self.fitted.zero
        if factor is None:
            scale = steps.half()
        else:
            scale = (steps / factor.float()[:, None]).round().to(torch.uint8)
        if zero is not None:
            zero = zeros.to(zero.dtype)
        return GroupedInteger.from_codes(codes, FittedGrid(self.grid, self.fitted.columns, scale, factor, zero))

    # ------------------------------------------------------------ learning

    @torch.no_grad()
    def descend(self, rate: float) -> None:
        """One step against the sign of the gradient, which is then forgotten."""
        for value, limits in ((self.offset, (-HALF, HALF)), (self.upper, FACTORS), (self.lower, FACTORS)):
            if value.grad is not None:
                value.sub_(value.grad.sign_(), alpha=rate).clamp_(*limits)
                value.grad = None


def spread(side: Tensor, fitted: FittedGrid) -> Tensor:
    """[out, groups] -> [out, in]: each group's value at each of its columns."""
    width, columns = fitted.grid.width(fitted.columns), fitted.columns
    return side[:, :, None].expand(-1, -1, width).reshape(side.shape[0], -1)[:, :columns]


def stored_steps(steps: Tensor, fitted: FittedGrid) -> Tensor:
    """The nearest steps that can be stored, with the gradient of the wanted ones."""
    if fitted.factor is None:
        return through(steps, steps.clamp(SMALLEST_STEP, LARGEST_STEP).half().float())
    factor = fitted.factor.float()[:, None]
    return through(steps, (steps / factor).round().clamp(1, 255) * factor)


def cell_values(form: GroupedInteger, weight: Tensor) -> Tensor:
    """The dense weight, drawn into the cell of its given code: float32 [out, in].

    A weight beyond either end of the grid stays there if its code is that end's, so that it does not come back when
    the grid moves a little.
    """
    fitted, codes = form.fitted, form.codes().float()
    steps, zeros = spread(fitted.steps(), fitted), spread(fitted.zeros(), fitted)
    low = torch.where(codes == 0, torch.full_like(codes, -torch.inf), codes - EDGE)
    high = torch.where(codes == fitted.grid.top, torch.full_like(codes, torch.inf), codes + EDGE)
    levels = (weight.float() / steps + zeros).clamp(low, high)
    base = (levels - zeros) * steps
    found = (base / steps + zeros).round().clamp(0, fitted.grid.top)
    return torch.where(found == codes, base, (codes - zeros) * steps)  # a far zero leaves no digits for the cell
