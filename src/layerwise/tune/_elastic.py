"""One latent weight under grids of many widths, and what keeps its distribution flat; see ``tune.eq_net``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from layerwise.encoding.encoded import Encoded
from layerwise.encoding.grid import FittedGrid, fit_grid
from layerwise.encoding.integer import GroupedInteger
from layerwise.tune._latent import Latent, integers
from layerwise.tune._rounding import spread, stored_steps, through
from layerwise.tune.network import TunedNetwork
from layerwise.tune.scope import TunedScope

FLAT = 1.8  # kurtosis of a uniform distribution
KURTOSIS, SKEWNESS = 0.015, 1.0  # their shares of the penalty
FLOOR = 1e-12  # under a variance


class Elastic(Latent):
    """u [out, in], shared by all widths, and for each width its own factors a [out, groups] of that width's steps.

    The grid of the width that was given is the one that was given; those of other widths are fitted to B.
    share: rate of the factors over that of the weights.
    """

    def __init__(self, form: Encoded, weight: Tensor, widths: Iterable[int], share: float) -> None:
        super().__init__(form, weight)
        self.share = share
        self.grids = {bits: self._fitted(bits) for bits in sorted({*widths, self.grid.bits})}
        self.factors = {b: torch.ones_like(fitted.steps(), requires_grad=True) for b, fitted in self.grids.items()}

    def _fitted(self, bits: int) -> FittedGrid:
        if bits == self.grid.bits:
            return self.fitted
        return fit_grid(self.base, replace(self.grid, bits=bits), clip=not self.grid.float_zero)

    def stored(self, bits: int) -> Tensor:
        """Steps [out, groups] of a width, each what will be stored."""
        return stored_steps(self.grids[bits].steps() * self.factors[bits], self.grids[bits])

    def codes(self, bits: int, steps: Tensor) -> Tensor:
        """Codes of a width as float32 [out, in] for steps [out, in]."""
        fitted = self.grids[bits]
        levels = (self.latent() / steps + spread(fitted.zeros(), fitted)).clamp(0, fitted.grid.top)
        return through(levels, levels.round())

    def weight_at(self, bits: int) -> Tensor:
        """W' [out, in] of a width: bit for bit what ``encoded_at(bits).decode()`` is."""
        fitted = self.grids[bits]
        steps = spread(self.stored(bits), fitted)
        return (self.codes(bits, steps) - spread(fitted.zeros(), fitted)) * steps

    @torch.no_grad()
    def encoded_at(self, bits: int) -> GroupedInteger:
        """The stored form of a width."""
        steps, fitted = self.stored(bits), self.grids[bits]
        return integers(self.codes(bits, spread(steps, fitted)), steps, fitted)

    def weight(self) -> Tensor:
        return self.weight_at(self.grid.bits)

    def encoded(self) -> GroupedInteger:
        return self.encoded_at(self.grid.bits)

    def rated(self, rate: float) -> list[tuple[Tensor, float]]:
        return [(self.shift, rate), *((factor, rate * self.share) for factor in self.factors.values())]


def shape_penalty(latents: Iterable[Tensor]) -> Tensor:
    """``0.015 mean (kurtosis - 1.8)^2 + mean skewness^2`` over matrices: zero where every one is uniform."""
    terms = []
    for latent in latents:
        centred = latent - latent.mean()
        z = centred / (centred.square().mean() + FLOOR).sqrt()
        terms.append(KURTOSIS * (z.pow(4).mean() - FLAT).square() + SKEWNESS * z.pow(3).mean().square())
    return torch.stack(terms).mean()


def sandwich(scope: TunedScope, learned: Mapping[str, Elastic], part: int, drawn: torch.Generator) -> None:
    """Gradients of the network at most bits, at drawn ones and at fewest, each taught by the one before it."""
    assert isinstance(scope, TunedNetwork)
    dense, teacher = scope.target(part), None
    for widths in (
        {path: max(at.grids) for path, at in learned.items()},
        {path: any_of(list(at.grids), drawn) for path, at in learned.items()},
        {path: min(at.grids) for path, at in learned.items()},
    ):
        found = scope.forward({path: at.weight_at(widths[path]) for path, at in learned.items()}, part)
        loss = scope.distances(dense, found).mean()
        if teacher is not None:
            loss = (loss + scope.distances(teacher, found).mean()) / 2
        loss.backward()  # type: ignore[no-untyped-call]
        teacher = found.detach()


def any_of(values: Sequence[int], drawn: torch.Generator) -> int:
    return values[int(torch.randint(len(values), (), generator=drawn))]
