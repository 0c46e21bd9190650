"""Latent weights on a grid whose levels are given: what the tuners that train a whole network have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from layerwise.encoding.encoded import Encoded
from layerwise.encoding.grid import FittedGrid
from layerwise.encoding.integer import GroupedInteger
from layerwise.tune._rounding import cell_values, spread
from layerwise.tune._training import Adam, State


class Latent:
    """The latent weight ``v = B + s0 u`` [out, in] of one linear, u in levels of the given grid and 0 at the start.

    B is the dense weight drawn into the cells of its given codes, so that rounding v on the given grid gives the codes
    that were given; s0 and z are the given steps and zeros [out, groups].
    """

    def __init__(self, form: Encoded, weight: Tensor) -> None:
        assert isinstance(form, GroupedInteger)
        self.fitted, self.grid = form.fitted, form.grid
        self.steps, self.zeros = self.fitted.steps(), self.fitted.zeros()
        self.base, self.wide = cell_values(form, weight), spread(self.steps, self.fitted)
        self.shift = torch.zeros_like(self.base, requires_grad=True)

    def latent(self) -> Tensor:
        """v [out, in]."""
        return torch.addcmul(self.base, self.wide, self.shift)


def integers(codes: Tensor, steps: Tensor, fitted: FittedGrid, zero: Tensor | None = None) -> GroupedInteger:
    """Codes [out, in] and steps [out, groups], which the grid can store as they are, in a given form.

    zero: new zeros in their stored type; those of ``fitted`` if None.
    """
    factor = fitted.factor
    scale = steps.half() if factor is None else (steps / factor.float()[:, None]).round().to(torch.uint8)
    kept = fitted.zero if zero is None else zero
    return GroupedInteger.from_codes(
        codes.to(torch.uint8), FittedGrid(fitted.grid, fitted.columns, scale, factor, kept)
    )


class Rated(State, Protocol):
    """A state that says what of it is learned, and how fast."""

    def rated(self, rate: float) -> list[tuple[Tensor, float]]:
        """(value, rate) of everything that is learned; ``rate`` is that of the weights, in levels."""


R = TypeVar("R", bound=Rated)


def adam(rate: float) -> Callable[[Mapping[str, R], float], None]:
    """Steps of Adam whose rate falls along half a cosine, from ``rate`` levels a step to 0."""
    optimiser = Adam()

    def descend(learned: Mapping[str, R], done: float) -> None:
        now = rate * 0.5 * (1 + math.cos(math.pi * done))
        optimiser.step(pair for at in learned.values() for pair in at.rated(now))

    return descend


def group_means(values: Tensor, fitted: FittedGrid) -> Tensor:
    """Mean of ``values`` [out, in] over every group's columns: [out, groups]."""
    width, columns = fitted.grid.width(fitted.columns), fitted.columns
    whole = columns // width * width
    means = values[:, :whole].reshape(len(values), -1, width).mean(2)
    return means if whole == columns else torch.cat([means, values[:, whole:].mean(1, keepdim=True)], 1)
