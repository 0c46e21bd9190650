"""A latent weight and its steps, both learned; see ``tune.lsq``."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.encoding.encoded import Encoded
from layerwise.encoding.integer import GroupedInteger
from layerwise.tune._latent import Latent, integers
from layerwise.tune._rounding import spread, stored_steps, through


class LearnedSteps(Latent):
    """u [out, in] and the factors a [out, groups] of the given steps.

    share: rate of the factors over that of the weights.
    """

    def __init__(self, form: Encoded, weight: Tensor, share: float) -> None:
        super().__init__(form, weight)
        self.share = share
        self.factor = torch.ones_like(self.steps, requires_grad=True)
        self.each_zero = spread(self.zeros, self.fitted)

    def stored(self) -> Tensor:
        """Steps [out, groups], each what will be stored."""
        return stored_steps(self.steps * self.factor, self.fitted)

    def codes(self, steps: Tensor) -> Tensor:
        """Codes as float32 [out, in] for steps [out, in]."""
        levels = (self.latent() / steps + self.each_zero).clamp(0, self.grid.top)
        return through(levels, levels.round())

    def weight(self) -> Tensor:
        steps = spread(self.stored(), self.fitted)
        return (self.codes(steps) - self.each_zero) * steps

    @torch.no_grad()
    def encoded(self) -> GroupedInteger:
        steps = self.stored()
        return integers(self.codes(spread(steps, self.fitted)), steps, self.fitted)

    def rated(self, rate: float) -> list[tuple[Tensor, float]]:
        return [(self.shift, rate), (self.factor, rate * self.share)]
