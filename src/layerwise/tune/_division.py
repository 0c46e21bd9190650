"""A grouped integer form as a differentiable function of the divisors of its weights; see ``tune.flexround``."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.encoding.encoded import Encoded
from layerwise.encoding.integer import GroupedInteger
from layerwise.tune._latent import integers
from layerwise.tune._rounding import cell_values, spread, stored_steps, through


class Divisors:
    """The learned state of one linear, all of it logarithms: L2 [out, in], l3 [out, 1] and l1 [out, groups]."""

    def __init__(self, form: Encoded, weight: Tensor) -> None:
        assert isinstance(form, GroupedInteger)
        self.fitted, self.grid = form.fitted, form.grid
        self.steps, self.zeros = self.fitted.steps(), spread(self.fitted.zeros(), self.fitted)
        self.base = cell_values(form, weight)
        self.each = torch.zeros_like(self.base, requires_grad=True)
        self.row = torch.zeros_like(self.base[:, :1], requires_grad=True)
        self.step = torch.zeros_like(self.steps, requires_grad=True)

    def codes(self, steps: Tensor) -> Tensor:
        """Codes as float32 [out, in] for steps [out, in]."""
        levels = self.base * torch.exp(-(self.each + self.row)) / steps + self.zeros
        return through(levels, levels.round()).clamp(0, self.grid.top)

    def stored(self) -> Tensor:
        """Steps [out, groups], each what will be stored."""
        return stored_steps(self.steps * self.step.exp(), self.fitted)

    def weight(self) -> Tensor:
        steps = spread(self.stored(), self.fitted)
        return (self.codes(steps) - self.zeros) * steps

    @torch.no_grad()
    def encoded(self) -> GroupedInteger:
        steps = self.stored()
        return integers(self.codes(spread(steps, self.fitted)), steps, self.fitted)

    def rated(self, rate: float, grid: float) -> list[tuple[Tensor, float]]:
        """(value, rate) of everything that is learned."""
        return [(self.each, rate), (self.row, rate), (self.step, grid)]
