"""Grids: the laws of their fit, in stored precision, at ordinary and at extreme weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerwise.encoding.grid import SMALLEST_STEP, Grid, fit_grid, group_of, points, round_to_grid
from layerwise.errors import InputError

GRIDS = [
    Grid(bits, 16, symmetric, scale_bits)
    for bits in (2, 3, 4, 8)
    for symmetric in (False, True)
    for scale_bits in (8, 16)
]


def weights(rows: int, columns: int, seed: int = 0, scale: float = 0.05) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def per_column(values: torch.Tensor, grid: Grid, columns: int) -> torch.Tensor:
    return values[:, group_of(columns, grid)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("scale", [0.05, 1e-7, 1e4])
def test_no_weight_is_further_than_half_a_step(grid: Grid, scale: float) -> None:
    weight = weights(9, 44, scale=scale)
    fitted = fit_grid(weight, grid)
    error = (weight - points(round_to_grid(weight, fitted), fitted)).abs()
    step = per_column(fitted.steps(), grid, 44)
    assert bool((error <= step / 2 * (1 + 1e-5)).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_other_code_is_nearer(bits: int, symmetric: bool) -> None:
    weight = weights(6, 32)
    fitted = fit_grid(weight, Grid(bits, 16, symmetric), clip=True)
    error = (weight - points(round_to_grid(weight, fitted), fitted)).abs()
    for code in range(2**bits):
        other = points(torch.full(weight.shape, code, dtype=torch.uint8), fitted)
        assert bool((error <= (weight - other).abs() * (1 + 1e-6) + 1e-12).all())


@given(st.integers(0, 50), st.sampled_from(GRIDS))
def test_rounding_is_idempotent(seed: int, grid: Grid) -> None:
    weight = weights(4, 23, seed)
    fitted = fit_grid(weight, grid)
    codes = round_to_grid(weight, fitted)
    assert torch.equal(round_to_grid(points(codes, fitted), fitted), codes)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("clip", [False, True])
def test_zero_is_a_point_of_every_grid(grid: Grid, clip: bool) -> None:
    weight = weights(8, 32) + 0.2  # groups that lie on one side of zero
    weight[:, ::3] = 0
    weight[3] = 0
    fitted = fit_grid(weight, grid, clip=clip)
    decoded = points(round_to_grid(weight, fitted), fitted)
    assert bool((decoded[weight == 0] == 0).all())
    if grid.scale_bits == 16:
        assert bool((fitted.steps()[3] == 1).all())


def test_the_formula_of_the_asymmetric_grid() -> None:
    weight = torch.tensor([[-0.5, 0.0, 0.25, 1.0]])
    fitted = fit_grid(weight, Grid(2, 0))
    assert fitted.steps().tolist() == [[0.5]]
    assert fitted.zeros().tolist() == [[1.0]]
    assert round_to_grid(weight, fitted).tolist() == [[0, 1, 1, 3]]  # 0.25 is a tie: half to even


def test_a_symmetric_grid_uses_all_its_levels() -> None:
    fitted = fit_grid(torch.tensor([[-1.0, 0.25, 0.5]]), Grid(2, 0, symmetric=True))
    assert fitted.steps().tolist() == [[0.5]]
    assert round_to_grid(torch.tensor([[-1.0, 0.25, 0.5]]), fitted).tolist() == [[0, 2, 3]]


@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("scale", [1e-9, 1e-5, 0.05, 1e4])
def test_steps_are_rounded_to_their_stored_type_upwards(scale: float, scale_bits: int) -> None:
    weight = weights(7, 64, scale=scale)
    fitted = fit_grid(weight, Grid(4, 16, scale_bits=scale_bits))
    body = weight.view(7, 4, 16)
    wanted = (body.amax(2).clamp(min=0) - body.amin(2).clamp(max=0)) / 15
    steps = fitted.steps()
    assert fitted.scale.dtype == (torch.float16 if scale_bits == 16 else torch.uint8)
    assert bool((steps >= wanted * (1 - 1e-6)).all())
    if scale == 0.05:
        assert bool((steps <= wanted * (1.002 if scale_bits == 16 else 1.03)).all())
    assert bool((steps >= SMALLEST_STEP).all())


def test_the_short_last_group_has_its_own_step() -> None:
    weight = torch.cat([torch.ones(2, 64), torch.full((2, 64), 2.0), torch.full((2, 44), 3.0)], 1)
    fitted = fit_grid(weight, Grid(8, 64))
    assert fitted.scale.shape == (2, 3)
    torch.testing.assert_close(points(round_to_grid(weight, fitted), fitted), weight, rtol=1e-3, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_clip_search_never_raises_the_error_it_searches(bits: int, symmetric: bool) -> None:
    weight = weights(32, 128)
    importance = torch.rand(128, generator=torch.Generator().manual_seed(1)) + 0.01
    grid = Grid(bits, 32, symmetric)

    def error(clip: bool) -> torch.Tensor:
        fitted = fit_grid(weight, grid, clip=clip, importance=importance)
        squares = (weight - points(round_to_grid(weight, fitted), fitted)) ** 2 * importance
        return squares.view(32, 4, 32).sum(2)

    assert bool((error(True) <= error(False) * (1 + 1e-4)).all())
    assert float(error(True).sum()) < {2: 0.9, 3: 0.95, 4: 0.99}[bits] * float(error(False).sum())


def test_importance_moves_the_clip() -> None:
    weight = weights(16, 64)
    weight[:, 0] = 0.5  # one large weight per group: clipped only if its column does not matter
    plain = torch.ones(64)
    heavy = plain.clone()
    heavy[0] = 1e4
    errors = []
    for importance in (plain, heavy):
        fitted = fit_grid(weight, Grid(2, 0), clip=True, importance=importance)
        errors.append(float((weight - points(round_to_grid(weight, fitted), fitted))[:, 0].abs().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_pieces_of_rows_do_not_change_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(50, 40)
    whole = fit_grid(weight, Grid(3, 16), clip=True)
    monkeypatch.setattr("layerwise.encoding.grid.CHUNK", 120)
    pieces = fit_grid(weight, Grid(3, 16), clip=True)
    assert torch.equal(whole.scale, pieces.scale)
    assert torch.equal(round_to_grid(weight, whole), round_to_grid(weight, pieces))


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.tensor([[1.0, float("nan")]]), "not finite"),
        (torch.tensor([[1.0, float("inf")]]), "not finite"),
        (torch.tensor([[3e38, -3e38]]), "largest number"),
        (torch.ones(3), "matrix"),
        (torch.ones(0, 3), "matrix"),
    ],
)
def test_what_no_grid_can_hold_is_refused(weight: torch.Tensor, words: str) -> None:
    for scale_bits in (8, 16):
        with pytest.raises(InputError, match=words):
            fit_grid(weight, Grid(4, scale_bits=scale_bits))


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 1},
        {"bits": 9},
        {"group": -1},
        {"scale_bits": 4},
        {"symmetric": True, "float_zero": True},
        {"bits": True},
    ],
)
def test_impossible_grids_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(InputError):
        Grid(**{"bits": 4, **options})
