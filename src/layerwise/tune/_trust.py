"""A latent weight whose step follows its spread, with gradients where rounding errs little; see ``tune.quest``."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.encoding.encoded import Encoded
from layerwise.encoding.integer import GroupedInteger
from layerwise.tune._latent import Latent, group_means, integers
from layerwise.tune._rounding import spread, stored_steps, through

SLACK = 1e-3  # of a half step: what float32 adds to the error of a weight on the rim of its cell


class Trusted(Latent):
    """u [out, in]; ``trust`` in half steps."""

    def __init__(self, form: Encoded, weight: Tensor, trust: float) -> None:
        super().__init__(form, weight)
        self.trust = trust
        self.each_zero = spread(self.zeros, self.fitted)
        self.squares = group_means(self.base.square(), self.fitted)

    @torch.no_grad()
    def stored(self) -> Tensor:
        """Steps [out, groups], each what will be stored; those that were given as long as v stays."""
        now = group_means(self.latent().square(), self.fitted)
        ratio = torch.where(self.squares > 0, now / self.squares, torch.ones_like(now)).sqrt()
        return stored_steps(self.steps * ratio, self.fitted)

    @torch.no_grad()
    def codes(self, steps: Tensor) -> Tensor:
        """Codes as float32 [out, in] for steps [out, in]."""
        return (self.latent() / steps + self.each_zero).round().clamp(0, self.grid.top)

    def weight(self) -> Tensor:
        steps, latent = spread(self.stored(), self.fitted), self.latent()
        rounded = (self.codes(steps) - self.each_zero) * steps
        trusted = (latent.detach() - rounded).abs() <= steps * (0.5 * self.trust * (1 + SLACK))
        return through(latent * trusted, rounded)

    @torch.no_grad()
    def encoded(self) -> GroupedInteger:
        steps = self.stored()
        return integers(self.codes(spread(steps, self.fitted)), steps, self.fitted)

    def rated(self, rate: float) -> list[tuple[Tensor, float]]:
        return [(self.shift, rate)]
