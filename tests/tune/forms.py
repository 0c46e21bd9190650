"""Stored forms of all grids, and a small scope to tune, for the tests of tuners."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from layerwise.encoding.grid import FittedGrid, Grid, fit_grid, round_to_grid
from layerwise.encoding.integer import GroupedInteger
from layerwise.tune.network import TunedNetwork

ROWS, COLUMNS = 12, 40
GRIDS = [
    Grid(bits, group, symmetric, scale_bits)
    for bits in (2, 3, 8)
    for group in (16, 0)
    for symmetric in (False, True)
    for scale_bits in (16, 8)
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(weight: Tensor, grid: Grid) -> GroupedInteger:
    fitted = fit_grid(weight, grid, clip=grid.bits == 2)
    return GroupedInteger.from_codes(round_to_grid(weight, fitted), fitted)


def moved(form: GroupedInteger, seed: int) -> GroupedInteger:
    """The same grid with codes up to three levels away, as error feedback leaves them."""
    change = torch.randint(-3, 4, form.shape, generator=torch.Generator().manual_seed(seed))
    return GroupedInteger.from_codes((form.codes().int() + change).clamp(0, form.grid.top).to(torch.uint8), form.fitted)


def float_zero(weight: Tensor, seed: int) -> GroupedInteger:
    """A grid with real zeros."""
    grid = Grid(3, 16, float_zero=True)
    scale = ((normal(ROWS, grid.groups(COLUMNS), seed=seed) / 3).abs() + 0.1).half()
    zero = (normal(*scale.shape, seed=seed + 1) + 3.5).half()
    fitted = FittedGrid(grid, COLUMNS, scale, None, zero)
    return GroupedInteger.from_codes(round_to_grid(weight, fitted), fitted)


def given_forms(weight: Tensor, seed: int) -> list[GroupedInteger]:
    """Every kind of integer form of ``weight``, with nearest and with other codes."""
    forms = [rounded(weight, grid) for grid in GRIDS] + [float_zero(weight, seed)]
    return [*forms, *(moved(form, seed) for form in forms)]


def agrees(state: Any) -> bool:
    """Whether what is evaluated is what is stored."""
    return torch.equal(state.encoded().decode(), state.weight())


def same(a: GroupedInteger, b: GroupedInteger) -> bool:
    return a.spec() == b.spec() and all(torch.equal(a.tensors()[k], t) for k, t in b.tensors().items())


def classifier(bits: int = 2) -> TunedNetwork:
    """``W2 relu(W1 x)`` as scores of 24 classes on correlated inputs, both linears rounded to nearest; loss KL."""
    mix = normal(COLUMNS, 6, seed=2)
    inputs = [(normal(64, 6, seed=10 + i) @ mix.T) + 0.3 * normal(64, COLUMNS, seed=20 + i) for i in range(4)]
    weights = {"in": normal(48, COLUMNS, seed=3) * 0.2, "out": normal(24, 48, seed=4) * 0.2}

    def forward(given: Mapping[str, Tensor], part: int) -> Tensor:
        return (inputs[part] @ given["in"].T).relu() @ given["out"].T

    def divergence(dense: Tensor, other: Tensor) -> Tensor:
        p, q = dense.log_softmax(-1), other.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)

    forms = {name: rounded(w, Grid(bits, 16)) for name, w in weights.items()}
    return TunedNetwork(
        forms, weights, len(inputs), forward, lambda part: forward(weights, part), divergence, lambda: None, 11
    )
