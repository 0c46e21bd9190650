"""FlexRound: the start is what was given, the gradient grows with the weight, and it is the division that helps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.tune.forms import COLUMNS, ROWS, agrees, classifier, given_forms, normal, rounded, same

from layerwise.encoding.grid import Grid
from layerwise.tune._division import Divisors
from layerwise.tune._training import Adam
from layerwise.tune.flexround import Flexround


@pytest.mark.parametrize("seed", range(2))
def test_the_start_is_what_was_given(seed: int) -> None:
    weight = normal(ROWS, COLUMNS, seed=seed) * 10.0 ** (3 * seed - 3)
    for form in given_forms(weight, seed):
        learned = Divisors(form, weight)
        assert torch.equal(learned.weight(), form.decode()) and same(learned.encoded(), form)


@pytest.mark.parametrize("seed", range(2))
def test_what_is_evaluated_is_what_is_stored(seed: int) -> None:
    weight = normal(ROWS, COLUMNS, seed=seed)
    for form in given_forms(weight, seed)[::5]:
        learned, optimiser = Divisors(form, weight), Adam()
        for step in range(4):
            (learned.weight() * normal(ROWS, COLUMNS, seed=step)).sum().backward()
            optimiser.step(learned.rated(0.1, 0.05))
            assert agrees(learned)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_gradient_is_the_one_on_paper(symmetric: bool) -> None:
    """d loss / d L2 = -K W exp(-L2 - l3) inside the grid and 0 outside, for loss = sum(K W')."""
    weight, k = normal(ROWS, COLUMNS, seed=5), normal(ROWS, COLUMNS, seed=6)
    form = rounded(weight * 0.7, Grid(3, 16, symmetric))  # narrower than the weight, so that some codes are cut off
    learned = Divisors(form, weight * 0.7)
    with torch.no_grad():
        learned.each.copy_(normal(ROWS, COLUMNS, seed=7) * 0.3)
        learned.row.copy_(normal(ROWS, 1, seed=8) * 0.3)
    (learned.weight() * k).sum().backward()
    group = torch.arange(COLUMNS) // 16
    steps, zeros = form.fitted.steps()[:, group], form.fitted.zeros()[:, group]
    divided = learned.base * torch.exp(-learned.each.detach() - learned.row.detach())
    codes = (divided / steps + zeros).round()
    inside = (codes >= 0) & (codes <= 7)
    assert 0 < float(inside.float().mean()) < 1
    wanted = -k * divided * inside
    for found, expected in ((learned.each.grad, wanted), (learned.row.grad, wanted.sum(1, keepdim=True))):
        assert found is not None and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_zeros_stay_and_no_weight_changes_its_sign() -> None:
    weight = normal(ROWS, COLUMNS)
    weight[:, ::7] = 0
    form = rounded(weight, Grid(3, 16))
    learned, optimiser = Divisors(form, weight), Adam()
    for step in range(20):
        (learned.weight() * normal(ROWS, COLUMNS, seed=step)).sum().backward()
        assert learned.each.grad is not None and not learned.each.grad[:, ::7].any()
        optimiser.step(learned.rated(0.3, 0.0))
    found = learned.weight().detach()
    assert not found[:, ::7].any() and bool((found * form.decode() >= 0).all())


def test_large_weights_move_further() -> None:
    """The paper's figure: under gradients of one size, codes move the further the larger their weight."""
    weight = normal(64, COLUMNS)
    form = rounded(weight, Grid(4, 0))
    learned = Divisors(form, weight)
    (learned.weight() * normal(64, COLUMNS, seed=3).sign()).sum().backward()
    assert learned.each.grad is not None
    with torch.no_grad():
        learned.each.sub_(learned.each.grad, alpha=0.2)
    distance = (learned.encoded().codes().int() - form.codes().int()).abs().float()
    middle = weight.abs().median()
    assert float(distance[weight.abs() > middle].mean()) > 3 * float(distance[weight.abs() <= middle].mean())


def test_it_is_the_division_that_helps() -> None:
    """Ablation: without the factors of the weights, rows and steps alone do much less."""
    scope = classifier()
    both = Flexround(steps=60, rate=0.03).tune(scope)
    assert both.before == scope.error(scope.encoded) and both.after == scope.error({**scope.encoded, **both.encoded})
    alone = Flexround(steps=60, rate=0.0, grid=0.01).tune(scope)
    assert both.after < 0.6 * both.before and both.after < 0.7 * alone.after


def test_zero_steps_change_nothing() -> None:
    found = Flexround(steps=0).tune(classifier())
    assert found.encoded == {} and found.before == found.after
    assert dataclasses.replace(Flexround(), steps=7).passes() == 7
