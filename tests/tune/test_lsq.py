"""LSQ: the start is what was given, both gradients are the paper's, and it is the gradient of the step that helps."""

from __future__ import annotations

import pytest
import torch
from tests.tune.forms import COLUMNS, ROWS, agrees, classifier, given_forms, normal, rounded, same
from torch import Tensor

from layerwise.encoding.grid import Grid
from layerwise.tune._latent import adam
from layerwise.tune._learned_steps import LearnedSteps
from layerwise.tune.lsq import Lsq


@pytest.mark.parametrize("seed", range(2))
def test_the_start_is_what_was_given(seed: int) -> None:
    weight = normal(ROWS, COLUMNS, seed=seed) * 10.0 ** (3 * seed - 3)
    for form in given_forms(weight, seed):
        learned = LearnedSteps(form, weight, 0.1)
        assert torch.equal(learned.weight(), form.decode()) and same(learned.encoded(), form)


@pytest.mark.parametrize("seed", range(2))
def test_what_is_evaluated_is_what_is_stored(seed: int) -> None:
    weight = normal(ROWS, COLUMNS, seed=seed)
    for form in given_forms(weight, seed)[::5]:
        learned = {"": LearnedSteps(form, weight, 0.2)}
        descend = adam(0.4)
        for step in range(4):
            (learned[""].weight() * normal(ROWS, COLUMNS, seed=step)).sum().backward()
            descend(learned, step / 4)
            assert agrees(learned[""])


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_gradients_are_those_on_paper(symmetric: bool) -> None:
    """For loss = sum(K W'): K inside the grid, and K times (round(v/s) - v/s, or the end's level) for the step."""
    weight, k = normal(ROWS, COLUMNS, seed=5), normal(ROWS, COLUMNS, seed=6)
    form = rounded(weight * 0.6, Grid(3, 16, symmetric))
    learned = LearnedSteps(form, weight, 1.0)
    with torch.no_grad():
        learned.shift.copy_(0.4 * normal(ROWS, COLUMNS, seed=7))
    (learned.weight() * k).sum().backward()
    group = torch.arange(COLUMNS) // 16
    s, z = form.fitted.steps().double(), form.fitted.zeros().double()[:, group]
    level = learned.latent().detach().double() / s[:, group] + z
    inside = (level >= 0) & (level <= 7)
    assert 0 < float(inside.float().mean()) < 1
    by_step = torch.where(inside, (level - z).round() - (level - z), level.clamp(0, 7) - z) * k
    wanted = torch.zeros_like(s).index_add_(1, group, by_step.double()) * s  # of the factor a, at s = s0 a
    shift = k * inside * s[:, group]
    assert learned.shift.grad is not None and learned.factor.grad is not None
    assert torch.allclose(learned.shift.grad.double(), shift.double(), rtol=1e-4, atol=1e-5)
    assert torch.allclose(learned.factor.grad.double(), wanted, rtol=1e-3, atol=1e-4)


def test_eight_bits_are_nearly_the_dense_weight() -> None:
    weight = normal(ROWS, COLUMNS)
    learned = LearnedSteps(rounded(weight, Grid(8, 16)), weight, 0.0)
    assert float((learned.weight().detach() - weight).abs().max()) < 0.015


def test_the_whole_loss_falls_and_learned_steps_add_to_it() -> None:
    scope = classifier()
    both = Lsq(steps=80, rate=0.03, grid=0.01).tune(scope)
    assert both.after == scope.error({**scope.encoded, **both.encoded}) < 0.3 * both.before
    fixed = Lsq(steps=80, rate=0.03, grid=0.0).tune(scope)
    assert both.after < fixed.after
    steps = Lsq(steps=80, rate=1e-9, grid=0.01).tune(scope)
    assert steps.after < steps.before


def test_it_is_the_distance_from_the_transition_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ablation: steps alone, learned with the paper's gradient and with that of a clipping range, which counts
    only the weights that are cut off."""
    scope = classifier()
    paper = Lsq(steps=60, rate=1e-9, grid=0.02).tune(scope)

    def clipped(self: LearnedSteps, steps: Tensor) -> Tensor:
        levels = (self.latent() / steps + self.each_zero).clamp(0, self.grid.top)
        inside = (levels > 0) & (levels < self.grid.top)
        value = torch.where(inside, self.latent() / steps + self.each_zero, levels)  # its s cancels in the product
        return value + (levels.round() - value).detach() * torch.where(inside, steps.detach() / steps, 1.0)

    monkeypatch.setattr(LearnedSteps, "codes", clipped)
    range_only = Lsq(steps=60, rate=1e-9, grid=0.02).tune(scope)
    assert paper.after < range_only.after


def test_zero_steps_change_nothing() -> None:
    found = Lsq(steps=0).tune(classifier())
    assert found.encoded == {} and found.before == found.after
