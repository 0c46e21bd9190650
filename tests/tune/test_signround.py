"""SIGNROUND: the start is what was given, the gradient is the one on paper, and it is the gradient that helps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerwise.encoding.dense import Dense
from layerwise.encoding.grid import FittedGrid, Grid, fit_grid, round_to_grid
from layerwise.encoding.integer import GroupedInteger
from layerwise.tune._rounding import FACTORS, HALF, Offsets, draws
from layerwise.tune.block import TunedBlock
from layerwise.tune.signround import Signround

ROWS, COLUMNS = 12, 40
GRIDS = [
    Grid(bits, group, symmetric, scale_bits)
    for bits in (2, 3, 8)
    for group in (16, 0)
    for symmetric in (False, True)
    for scale_bits in (16, 8)
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def rounded(weight: Tensor, grid: Grid) -> GroupedInteger:
    fitted = fit_grid(weight, grid, clip=grid.bits == 2)
    return GroupedInteger.from_codes(round_to_grid(weight, fitted), fitted)


def moved(form: GroupedInteger, seed: int) -> GroupedInteger:
    """The same grid with codes up to three levels away, as error feedback leaves them."""
    change = torch.randint(-3, 4, form.shape, generator=generator(seed))
    return GroupedInteger.from_codes((form.codes().int() + change).clamp(0, form.grid.top).to(torch.uint8), form.fitted)


def float_zero(weight: Tensor, seed: int) -> GroupedInteger:
    """A grid with real zeros, one of them far outside the codes."""
    grid = Grid(3, 16, float_zero=True)
    scale = (torch.rand(ROWS, grid.groups(COLUMNS), generator=generator(seed)) + 0.1).half()
    zero = (torch.rand(scale.shape, generator=generator(seed + 1)) * 9 - 1).half()
    zero[0, 0] = 3000.0
    fitted = FittedGrid(grid, COLUMNS, scale, None, zero)
    return GroupedInteger.from_codes(round_to_grid(weight, fitted), fitted)


# ---------------------------------------------------------------- exactness


@given(st.sampled_from(GRIDS), st.integers(0, 99), st.booleans())
def test_the_start_is_what_was_given(grid: Grid, seed: int, nearest: bool) -> None:
    weight = normal(ROWS, COLUMNS, seed=seed) * 10.0 ** (seed % 7 - 4)
    form = rounded(weight, grid) if nearest else moved(rounded(weight, grid), seed)
    learned = Offsets(form, weight, True)
    assert torch.equal(learned.weight(), form.decode())
    found = learned.encoded()
    assert all(torch.equal(found.tensors()[k], t) for k, t in form.tensors().items())


def test_the_start_with_real_zeros() -> None:
    weight = normal(ROWS, COLUMNS)
    form = moved(float_zero(weight, 3), 4)
    learned = Offsets(form, weight, True)
    assert torch.equal(learned.weight(), form.decode())
    assert all(torch.equal(learned.encoded().tensors()[k], t) for k, t in form.tensors().items())


@given(st.sampled_from(GRIDS), st.integers(0, 99))
def test_what_is_evaluated_is_what_is_stored(grid: Grid, seed: int) -> None:
    weight = normal(ROWS, COLUMNS, seed=seed)
    learned = Offsets(moved(rounded(weight, grid), seed), weight, True)
    for step in range(6):
        (learned.weight() * normal(ROWS, COLUMNS, seed=seed + step)).sum().backward()
        learned.descend(0.1)
        assert torch.equal(learned.encoded().decode(), learned.weight())
    assert float(learned.offset.detach().abs().max()) <= HALF
    for ends in (learned.upper.detach(), learned.lower.detach()):
        assert FACTORS[0] - 1e-6 <= float(ends.min()) and float(ends.max()) <= FACTORS[1] + 1e-6


@given(st.sampled_from([g for g in GRIDS if not g.symmetric]), st.integers(0, 99))
def test_without_ranges_a_code_moves_one_level_at_most(grid: Grid, seed: int) -> None:
    weight = normal(ROWS, COLUMNS, seed=seed)
    form = moved(rounded(weight, grid), seed)
    learned = Offsets(form, weight, False)
    for _ in range(5):
        (learned.weight() * normal(ROWS, COLUMNS, seed=seed + 1)).sum().backward()
        learned.descend(0.3)
    found = learned.encoded()
    assert torch.equal(found.fitted.scale, form.fitted.scale)
    distance = (found.codes().int() - form.codes().int()).abs()
    assert int(distance.max()) == 1


def test_the_gradient_is_the_one_on_paper() -> None:
    """d loss / d (V, a, c) for loss = sum(K W'), straight through rounding, by hand in float64."""
    grid = Grid(3, 16)
    weight, k = normal(ROWS, COLUMNS, seed=5), normal(ROWS, COLUMNS, seed=6)
    fitted = fit_grid(weight * 0.7, grid)  # narrower than the weight, so that some codes are cut off
    form = GroupedInteger.from_codes(round_to_grid(weight, fitted), fitted)
    learned = Offsets(form, weight, True)
    (learned.weight() * k).sum().backward()

    top, group = float(grid.top), torch.arange(COLUMNS) // 16
    s, z = fitted.steps().double(), fitted.zeros().double()
    each_s, each_z = s[:, group], z[:, group]
    level = weight.double() / each_s + each_z
    inside = ((level.round() >= 0) & (level.round() <= top)).double()
    assert 0 < float(inside.mean()) < 1
    code = level.round().clamp(0, top)
    by_step = k * ((code - each_z) - inside * weight / each_s)  # d/ds' at fixed z'
    by_zero = k * each_s * (inside - 1)
    sums = [torch.zeros_like(s).index_add_(1, group, part.double()) for part in (by_step, by_zero)]
    upper = sums[0] * s * (top - z) / top - sums[1] * z * (top - z) / top
    lower = sums[0] * s * z / top + sums[1] * z * (top - z) / top
    for found, wanted in ((learned.offset, k * each_s * inside), (learned.upper, upper), (learned.lower, lower)):
        assert found.grad is not None
        assert torch.allclose(found.grad.double(), wanted.double(), rtol=1e-4, atol=1e-4)


def test_every_part_is_drawn_equally_often() -> None:
    found = list(draws(5, 23, 7))
    assert sorted(found[:5]) == sorted(found[5:10]) == [0, 1, 2, 3, 4] and found[:5] != found[5:10]
    assert found == list(draws(5, 23, 7)) != list(draws(5, 23, 8)) and len(found) == 23


# ---------------------------------------------------------------- ablation


def two_layers(bits: int = 2, padded: bool = False) -> TunedBlock:
    """``x + W2 relu(W1 x)`` on inputs with strongly correlated channels, both linears rounded to nearest."""
    mix = normal(COLUMNS, 6, seed=2)
    inputs = [(normal(4, 16, 6, seed=10 + i) @ mix.T) + 0.3 * normal(4, 16, COLUMNS, seed=20 + i) for i in range(4)]
    weights = {"in": normal(48, COLUMNS, seed=3) * 0.2, "out": normal(COLUMNS, 48, seed=4) * 0.2}
    mask = torch.ones(4, 16, dtype=torch.bool)
    if padded:
        mask[:, 10:] = False
        inputs = [x + 1e3 * ~mask[:, :, None] for x in inputs]

    def forward(given: Mapping[str, Tensor], part: int) -> Tensor:
        x = inputs[part]
        return x + (x @ given["in"].T).relu() @ given["out"].T

    grid = Grid(bits, 16)
    return TunedBlock(
        "block", {name: rounded(w, grid) for name, w in weights.items()}, weights, len(inputs), forward,
        lambda part: forward(weights, part), lambda part: mask if padded else None, 11,
    )  # fmt: skip


def test_sign_descent_beats_frozen_rounding_and_ranges_add_to_it() -> None:
    block = two_layers()
    both = Signround(steps=60).tune(block)
    offsets = Signround(steps=60, ranges=False).tune(block)
    assert both.before == offsets.before == block.error(block.encoded)
    assert offsets.after < 0.75 * offsets.before
    assert both.after < 0.9 * offsets.after
    assert both.after == block.error(block.encoded | both.encoded)


def test_it_is_the_gradient_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    block, noise = two_layers(), generator(1)
    learned = Signround(steps=60).tune(block)
    descend = Offsets.descend

    def at_random(self: Offsets, rate: float) -> None:
        for value in (self.offset, self.upper, self.lower):
            if value.grad is not None:
                value.grad = torch.randn(value.shape, generator=noise)
        descend(self, rate)

    monkeypatch.setattr(Offsets, "descend", at_random)
    random = Signround(steps=60).tune(block)
    assert learned.after < 0.7 * random.after and random.after <= random.before


def test_padding_does_not_count() -> None:
    found = Signround(steps=40).tune(two_layers(padded=True))
    assert found.after < 0.75 * found.before < 100


def test_other_forms_are_left_alone() -> None:
    block = two_layers()
    dense = Dense(block.weights["out"].half())
    mixed = dataclasses.replace(
        block,
        encoded={"in": block.encoded["in"], "out": dense},
        forward=lambda given, part: block.forward({"out": dense.decode(), **given}, part),
    )
    found = Signround(steps=10).tune(mixed)
    assert set(found.encoded) == {"in"} and not Signround().touches(dense)
    nothing = dataclasses.replace(mixed, encoded={"out": dense}, forward=lambda given, part: block.target(part))
    assert Signround(steps=10).tune(nothing).encoded == {}


def test_zero_steps_and_groups_of_zeros() -> None:
    block = two_layers()
    nothing = Signround(steps=0).tune(block)
    assert nothing.encoded == {} and nothing.before == nothing.after
    zero = torch.zeros(ROWS, COLUMNS)
    learned = Offsets(rounded(zero, Grid(2, 16)), zero, True)
    learned.weight().sum().backward()
    learned.descend(0.5)
    assert torch.isfinite(learned.encoded().decode()).all()
