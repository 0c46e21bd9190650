"""QuEST: the start is what was given, the mask is the paper's, steps follow the spread, and the mask helps."""

from __future__ import annotations

import pytest
import torch
from tests.tune.forms import COLUMNS, ROWS, agrees, classifier, given_forms, normal, rounded, same

from layerwise.encoding.grid import Grid
from layerwise.tune._latent import adam, group_means
from layerwise.tune._rounding import spread
from layerwise.tune._trust import Trusted
from layerwise.tune.quest import Quest


@pytest.mark.parametrize("seed", range(2))
def test_the_start_is_what_was_given_and_is_stored_as_it_is(seed: int) -> None:
    weight = normal(ROWS, COLUMNS, seed=seed) * 10.0 ** (3 * seed - 3)
    for form in given_forms(weight, seed):
        learned = Trusted(form, weight, 1.0)
        assert torch.equal(learned.weight(), form.decode()) and same(learned.encoded(), form)
    descend = adam(0.4)
    for step in range(4):
        (learned.weight() * normal(ROWS, COLUMNS, seed=step)).sum().backward()
        descend({"": learned}, step / 4)
        assert agrees(learned)


def test_only_weights_cut_off_by_more_than_half_a_step_are_masked() -> None:
    weight, k = normal(ROWS, COLUMNS, seed=5), normal(ROWS, COLUMNS, seed=6)
    learned = Trusted(rounded(weight, Grid(3, 16)), weight, 1.0)
    with torch.no_grad():
        learned.shift.copy_(normal(ROWS, COLUMNS, seed=7))
    (learned.weight() * k).sum().backward()
    steps = spread(learned.stored(), learned.fitted)
    level = learned.latent().detach() / steps + learned.each_zero
    trusted = (level >= -0.5) & (level <= 7.5)
    assert 0 < float(trusted.float().mean()) < 1
    found = learned.shift.grad
    assert found is not None and torch.allclose(found, k * trusted * learned.wide)


def test_without_a_threshold_it_is_the_plain_straight_through_gradient() -> None:
    weight, k = normal(ROWS, COLUMNS, seed=5), normal(ROWS, COLUMNS, seed=6)
    learned = Trusted(rounded(weight * 0.3, Grid(2, 16)), weight, 1e6)
    (learned.weight() * k).sum().backward()
    assert learned.shift.grad is not None and torch.equal(learned.shift.grad, k * learned.wide)


def test_steps_follow_the_spread() -> None:
    """A latent weight that grows to c times itself has steps of c times the start, up to fp16."""
    weight = normal(ROWS, COLUMNS)
    form = rounded(weight, Grid(3, 16))
    learned = Trusted(form, weight, 1.0)
    with torch.no_grad():
        learned.shift.copy_(0.5 * learned.base / learned.wide)
    assert torch.allclose(learned.stored(), 1.5 * form.fitted.steps(), rtol=1e-3)
    assert torch.equal(learned.encoded().codes(), form.codes())
    assert group_means(weight, form.fitted).shape == form.fitted.scale.shape


def test_training_helps_and_so_does_trust() -> None:
    """Ablation: trusting every weight, and trusting none but those that rounding hardly moves, both do worse."""
    scope = classifier()
    found = {trust: Quest(steps=80, rate=0.03, trust=trust).tune(scope) for trust in (1.0, 0.1, 1e6)}
    assert found[1.0].after == scope.error({**scope.encoded, **found[1.0].encoded}) < 0.5 * found[1.0].before
    assert found[1.0].after < found[0.1].after and found[1.0].after < found[1e6].after


def test_zero_steps_change_nothing() -> None:
    found = Quest(steps=0).tune(classifier())
    assert found.encoded == {} and found.before == found.after
