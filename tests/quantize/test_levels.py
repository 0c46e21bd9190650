"""Rounding to uneven levels with feedback: the even case is the one already known, and refits never raise the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.quantize.conftest import loss

from layerwise.encoding.forms import restore_form
from layerwise.encoding.grid import Grid, fit_grid, group_of, points
from layerwise.quantize._levels import Basis, Feedback, bases_of, place, refit, rescaled
from layerwise.quantize._rounding import factor, round_with_feedback
from layerwise.recipe import parse_technique


@pytest.fixture
def sides(moments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return moments(72)[0], moments(40, 1)[0]


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("sweeps", [0, 2])
def test_even_levels_are_rounded_as_an_even_grid(both: bool, sweeps: int, weight: Any, sides: Any) -> None:
    fitted = fit_grid(weight, Grid(3, 16))
    columns = factor(sides[0], 0.01, largest_first=True)
    rows = factor(sides[1], 0.5, largest_first=True) if both else None
    assert columns is not None
    codes = round_with_feedback(weight, fitted, columns, rows, sweeps=sweeps)
    levels = (torch.arange(8.0) - fitted.zeros()[..., None]) * fitted.steps()[..., None]
    found = place(weight, levels, group_of(72, fitted.grid), Feedback(columns, rows), sweeps)
    assert float((found == codes).float().mean()) > 0.999  # ties, which float32 middles decide otherwise
    torch.testing.assert_close(
        points(found, fitted), points(codes, fitted), rtol=0, atol=float(fitted.steps().max()) * 1.001
    )


def test_revising_given_codes_lowers_the_damped_loss(weight: Any, sides: Any, site: Any) -> None:
    feedback = Feedback.of(weight, site(sides[1], sides[0]), True)
    levels = torch.tensor([-0.1, -0.02, 0.05]).expand(40, 1, 3).contiguous()
    groups = torch.zeros(72, dtype=torch.int64)
    start = place(weight, levels, groups, Feedback(None, None))
    values = levels[0, 0]
    before, after = (
        damped(values[codes.int()] - weight, feedback)
        for codes in (start, place(weight, levels, groups, feedback, start=start))
    )
    assert after < 0.9 * before


def damped(change: Any, feedback: Feedback) -> float:
    assert feedback.columns is not None and feedback.rows is not None
    columns, rows = feedback.columns, feedback.rows
    return loss(change[rows.order][:, columns.order], columns.matrix, rows.matrix)


@pytest.mark.parametrize("group", [0, 30])
@pytest.mark.parametrize("both", [True, False])
def test_refitted_scales_have_no_slope_left_and_less_loss(
    both: bool, group: int, weight: Any, sides: Any, site: Any
) -> None:
    feedback = Feedback.of(weight, site(sides[1], sides[0]), True)
    if not both:
        feedback = Feedback(feedback.columns, None)
    assert feedback.columns is not None
    signs = torch.where(weight >= 0, 1.0, -1.0)[:, None]
    bases = bases_of(signs, group)
    scales = torch.full((40, len(bases)), 0.03)

    def total(s: Any) -> float:
        change = -weight.double()
        for q, basis in enumerate(bases):
            change[:, basis.columns] += s[:, q, None].double() * basis.values
        if both:
            return damped(change, feedback)
        return loss(change[:, feedback.columns.order], feedback.columns.matrix)  # type: ignore[union-attr]

    found = refit(weight, bases, scales, feedback)
    assert total(found) < 0.95 * total(scales)
    if group == 0:  # one unknown a row: the joint optimum, so that no nudge helps
        for k in range(0, 40, 7):
            for nudge in (-1e-4, 1e-4):
                moved = found.clone()
                moved[k] += nudge
                assert total(moved) >= total(found)
    for _ in range(5):
        again = refit(weight, bases, found, feedback)
        assert total(again) <= total(found) * (1 + 1e-6)
        found = again


def test_a_refit_without_feedback_or_of_too_much_work_changes_nothing(
    weight: Any, sides: Any, site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales, whole = torch.ones(40, 1), Basis(slice(0, 72), torch.ones(40, 72).double())
    assert refit(weight, [whole], scales, Feedback(None, None)) is scales
    monkeypatch.setattr("layerwise.quantize._levels.MOST_WORK", 100)
    assert refit(weight, [whole], scales, Feedback.of(weight, site(sides[1], sides[0]), True)) is scales


def test_rescaled_columns_are_the_same_problem(weight: Any, sides: Any, site: Any) -> None:
    feedback = Feedback.of(weight, site(sides[1], sides[0]), True)
    factors = torch.rand(72, generator=torch.Generator().manual_seed(0)) + 0.5
    made = rescaled(feedback, factors)
    assert made.columns is not None and feedback.columns is not None
    product = made.columns.upper.T @ torch.diag(made.columns.pivots) @ made.columns.upper
    torch.testing.assert_close(product, made.columns.matrix)
    torch.testing.assert_close(made.columns.upper.diagonal(), torch.ones(72, dtype=torch.float64))
    change = torch.randn(40, 72, generator=torch.Generator().manual_seed(1))
    assert damped(change, made) == pytest.approx(damped(change * factors, feedback))


@pytest.mark.parametrize(
    "options", ["bits=2,group=16", "bits=3,group=32,scale_bits=8", "bits=4,group=0,symmetric=true"]
)
def test_refitted_grids_do_less_damage_on_other_tokens(options: str, weight: Any, moments: Any, site: Any) -> None:
    """Ablation: the same codes, sweeps and bytes without the refits."""
    (fit, judge), (rows, other_rows) = moments(72), moments(40, 1)
    known = site(rows, fit)
    made: list[Any] = [parse_technique(f"two_sided:{options},refits={k}") for k in (0, 4)]
    before, after = (encoder.encode(weight, known) for encoder in made)
    assert before.nbytes == after.nbytes and before.spec() == after.spec()
    assert torch.equal(restore_form(after.spec(), after.tensors()).decode(), after.decode())
    losses = [loss(form.decode() - weight, judge, other_rows) for form in (before, after)]
    assert losses[1] < 0.97 * losses[0]
