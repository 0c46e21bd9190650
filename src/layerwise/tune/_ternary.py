"""A latent weight on three levels whose distance is a statistic of it; see ``tune.ternary_binary``."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.encoding.encoded import Encoded
from layerwise.encoding.grid import FittedGrid
from layerwise.encoding.integer import GroupedInteger
from layerwise.tune._latent import group_means, integers
from layerwise.tune._rounding import spread, stored_steps, through

SHARE = 4 / 3  # of the mean magnitude
CENTRE = 1  # code of zero where the form stores one; 0 and 2 are beside it


class ThreeLevels:
    """The latent weight ``v = W + a0 u``, u [out, in] in units of the first scale, and 0 at the start."""

    def __init__(self, form: Encoded, weight: Tensor) -> None:
        assert isinstance(form, GroupedInteger)
        self.fitted, self.grid = form.fitted, form.grid
        self.base = weight.float()
        self.shift = torch.zeros_like(self.base, requires_grad=True)
        zero = self.fitted.zero
        self.zero = None if zero is None else torch.full_like(zero, CENTRE)
        self.centre = self.grid.middle if zero is None else CENTRE
        self.first = spread(scales_of(self.base, self.fitted), self.fitted)

    def latent(self) -> Tensor:
        """v [out, in]."""
        return torch.addcmul(self.base, self.first, self.shift)

    @torch.no_grad()
    def scales(self) -> Tensor:
        """a [out, groups], each what will be stored."""
        return scales_of(self.latent(), self.fitted)

    @torch.no_grad()
    def trits(self, scales: Tensor) -> Tensor:
        """-1, 0 or 1 as float32 [out, in] for scales [out, in]."""
        return (self.latent() / scales).round().clamp(-1, 1)

    def weight(self) -> Tensor:
        scales = spread(self.scales(), self.fitted)
        return through(self.latent(), self.trits(scales) * scales)

    @torch.no_grad()
    def encoded(self) -> GroupedInteger:
        scales = self.scales()
        codes = self.trits(spread(scales, self.fitted)) + self.centre
        return integers(codes, scales, self.fitted, self.zero)

    def rated(self, rate: float) -> list[tuple[Tensor, float]]:
        return [(self.shift, rate)]


def scales_of(latent: Tensor, fitted: FittedGrid) -> Tensor:
    """4/3 of every group's mean magnitude as it will be stored, [out, groups]; 1 for a group of zeros."""
    means = SHARE * group_means(latent.abs(), fitted)
    return stored_steps(torch.where(means > 0, means, torch.ones_like(means)), fitted)
