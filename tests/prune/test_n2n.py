"""N2N: the reward's algebra, students of a chain, the policy's gradient, and search that beats chance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.contract.test_sparsifiers import pictures, same, values
from torch import nn

from layerwise.errors import InputError
from layerwise.prune._policies import Removal, Shrinkage
from layerwise.prune._students import chain_of, parameters_of
from layerwise.prune.n2n import FACTORS, REFUSED, School, reward_of, shrunk
from layerwise.prune.sparsified import Examples
from layerwise.recipe import parse_sparsifier
from layerwise.trials.sparsifiers import convolutions, drawn


@given(st.integers(1, 1000), st.integers(0, 999), st.floats(0, 1), st.floats(0.1, 1))
def test_reward(of: int, less: int, accuracy: float, teacher: float) -> None:
    parameters = max(0, of - less)
    found = reward_of(accuracy, teacher, parameters, of)
    assert found == pytest.approx(accuracy / teacher * (1 - (parameters / of) ** 2), abs=1e-12)
    assert reward_of(accuracy, teacher, of, of) == 0
    assert reward_of(accuracy + 0.1, teacher, parameters, of) >= found
    if parameters:
        assert reward_of(accuracy, teacher, parameters - 1, of) >= found


def chain(seed: int = 0) -> tuple[Any, nn.Module]:
    module = drawn(seed, lambda: convolutions((4, 6, 6, 8))).eval()
    return chain_of(module, pictures(2)[0], "n2n"), module


def test_all_kept_is_the_teacher_and_what_is_gone_is_gone() -> None:
    found, module = chain()
    built = found.built(found.teacher, 0)
    assert found.teacher == (4, 6, 6, 8) and same(values(built), values(module))
    without = found.built((4, 0, 6, 5), 0)
    widths = [m.out_channels for m in without if isinstance(m, nn.Conv2d)]
    norms = [m.num_features for m in without if isinstance(m, nn.BatchNorm2d)]
    assert widths == norms == [4, 6, 5] and without(pictures(3)[0]).shape == (3, 10)
    assert torch.equal(without[0].weight, module[0].weight)  # the shape is the teacher's, so its weights are too
    assert parameters_of(without) < parameters_of(module)
    assert shrunk((4, 0, 6, 1), (0, 0, 6, 0)) == (1, 0, 6, 1)
    assert found.features(found.teacher).shape == (4, 5)


def test_layers_that_do_not_fit_together_are_refused_or_earn_nothing() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 10))
    pixels, labels = pictures(8)
    wide = chain_of(module, pixels, "n2n")
    assert wide.built((0, 4), 0) is not None  # the linear takes what comes
    deep = nn.Sequential(nn.Conv2d(1, 4, 7), nn.Conv2d(4, 4, 1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 10))
    found = chain_of(deep, pixels, "n2n")
    assert found.built((4, 0), 0) is not None
    none = nn.Sequential(nn.Conv2d(1, 4, 3, padding=4), nn.MaxPool2d(9), nn.Flatten(), nn.Linear(4, 10))
    school = School(Examples(none, pixels, labels), chain_of(none, pixels, "n2n"), none.eval(), 1)
    assert school.chain.built((0,), 0) is None and school.reward((0,)) == REFUSED and school.best() == (4,)
    with pytest.raises(InputError, match="grouped"):
        chain_of(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 2)), pixels, "n2n")


def test_a_student_is_judged_once() -> None:
    found, module = chain()
    pixels, labels = pictures(64)
    school = School(Examples(module, pixels, labels), found, module, 1)
    first, calls = school.reward((4, 0, 0, 8)), []
    school.judged = lambda student: calls.append(student) or 0.0  # type: ignore[method-assign,func-returns-value]
    assert school.reward((4, 0, 0, 8)) == first and not calls
    assert school.reward((4, 6, 0, 8)) == 0.0 and calls


def test_the_log_chance_is_that_of_what_was_drawn() -> None:
    """One layer is a bandit of two arms: d log pi(a) / d logit_k = [k = a] - pi(k)."""
    policy, generator = Removal(0), torch.Generator().manual_seed(0)
    features = chain()[0].features((4, 6, 6, 8))[:1]
    logits = policy.says(policy.reads(features[None])[0][0])[0]
    (action,), chance = policy.drawn(features, generator)
    chance.backward()
    wanted = -logits.softmax(0)
    wanted[action] += 1
    torch.testing.assert_close(policy.says.bias.grad, wanted.detach())
    actions, total = Shrinkage(7, 0).drawn(chain()[0].features((4, 6, 6, 8)), generator, FACTORS)
    assert len(actions) == 4 and all(0 <= a < 7 for a in actions) and float(total.detach()) > -4 * math.log(7) * 1.5


def test_policies_that_learn_draw_better_students_than_chance() -> None:
    """The ablation: with a learning rate of 0, which is random search, later students earn no more than earlier ones.

    The reward is the paper's with an accuracy that is known: the second layer is needed, the others help a little.
    """

    class Known:
        def reward(self, student: Any) -> float:
            accuracy = 0.2 + 0.6 * min(student[1], 4) / 4 + 0.05 * sum(width > 0 for width in student)
            return reward_of(accuracy, 1.0, sum(student), 24)

    found, _ = chain()
    school: Any = Known()
    examples = Examples(nn.Identity(), torch.zeros(1, 1))
    later, features = {}, found.features(found.teacher)
    for rate in (0.03, 0.0):
        setting: Any = parse_sparsifier(f"n2n:steps=40,students=5,rate={rate}")
        policy, generator = Removal(0), torch.Generator().manual_seed(0)
        rewards = setting.search(
            lambda p=policy, g=generator: p.drawn(features, g),
            policy,
            school,
            lambda kept: tuple(w * k for w, k in zip(found.teacher, kept, strict=True)),
            examples,
        )
        later[rate] = sum(rewards[-50:]) / 50
        if not rate:
            assert later[rate] < sum(rewards[:50]) / 50 + 0.1
    assert later[0.03] > later[0.0] + 0.1, later
