"""RSQ: GPTQ where tokens weigh alike, on a subset where they weigh 0 or 1, and better on the tokens that count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.quantize.conftest import loss
from torch import Tensor

from layerwise.calibrate.moments import Moment
from layerwise.calibrate.statistics import SiteStatistics, Use, Wanted
from layerwise.recipe import parse_technique


def encode(recipe: str, weight: Tensor, statistics: SiteStatistics) -> Any:
    encoder: Any = parse_technique(recipe)
    return encoder.encode(weight, statistics)


def measured(x: Tensor, u: Tensor | None) -> SiteStatistics:
    """Statistics of a linear with these inputs ``[tokens, n]`` and importances ``[tokens]``."""
    moment = Moment(x.shape[1], wanted=Wanted(importance=u is not None))
    moment.add(x, u)
    h = moment.mean()
    use = Use(torch.ones(40), h, h, moment.absolute_mean(), 1.0, len(x), moment.importance(len(x)))
    return SiteStatistics((use,))


@pytest.fixture
def tokens() -> tuple[Tensor, Tensor, Tensor]:
    """(inputs ``[2, 2000, 72]`` of two kinds of token, half and half; importance; which are important)."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(2, 72, 72, generator=generator) * torch.linspace(2, 0.05, 72)[:, None]
    x = torch.randn(2, 2000, 72, generator=generator)
    kind = torch.arange(2000) % 2 == 0
    x = torch.where(kind[:, None], x @ mix[0], x @ mix[1])
    return x, torch.where(kind, 0.8 + 0.2 * torch.rand(2000, generator=generator), torch.zeros(2000)), kind


def same(a: Any, b: Any) -> bool:
    return torch.equal(a.codes(), b.codes()) and torch.equal(a.decode(), b.decode())


@pytest.mark.parametrize("options", ["", ",act_order=false", ",clip=false", ",symmetric=true", ",scale_bits=8"])
def test_where_tokens_weigh_alike_it_is_gptq(options: str, weight: Tensor, tokens: Any) -> None:
    x, u, _ = tokens
    known, unknown, even = measured(x[0], u), measured(x[0], None), measured(x[0], torch.ones(2000))
    for recipe, statistics in (
        (f"rsq:bits=3,group=32,least=1{options}", known),
        (f"rsq:bits=3,group=32{options}", unknown),
        (f"rsq:bits=3,group=32{options}", even),
    ):
        assert same(encode(recipe, weight, statistics), encode(f"gptq:bits=3,group=32{options}", weight, unknown))


@pytest.mark.parametrize("power", [1, 2])
def test_weights_of_nearly_nought_and_one_are_gptq_on_the_subset(power: int, weight: Tensor, tokens: Any) -> None:
    x, _, kind = tokens
    encoder: Any = parse_technique(f"rsq:least=0.001,power={power}")
    found = encoder.moment(measured(x[0], kind.float()))
    expected = measured(x[0][kind], None).inputs
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=2e-3 * float(expected.diagonal().max()))


def test_scaled_features_have_the_weighted_moment(tokens: Any) -> None:
    x, u, _ = tokens
    r = 0.3 + 0.7 * u.double()
    for power, features in ((2, x[0].double() * r[:, None]), (1, x[0].double() * r.sqrt()[:, None])):
        encoder: Any = parse_technique(f"rsq:least=0.3,power={power}")
        expected = features.T @ features / (r**power).sum()
        found = encoder.moment(measured(x[0], u)).double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.diagonal().max()))


def test_important_tokens_gain_what_the_others_pay(weight: Tensor, tokens: Any) -> None:
    """Ablation: on other tokens of the same kinds the important ones' error falls, not with shuffled importance."""
    x, u, kind = tokens
    important, rest, held = (x[1][k].T @ x[1][k] / 1000 for k in (kind, ~kind, slice(None)))
    shuffled = u[torch.randperm(2000, generator=torch.Generator().manual_seed(2))]
    for bits in (2, 3):
        found = {}
        for name, importance in (("rsq", u), ("gptq", None), ("shuffled", shuffled)):
            change = (
                encode(f"rsq:bits={bits},group=32,least=0.05", weight, measured(x[0], importance)).decode() - weight
            )
            found[name] = [loss(change, h) for h in (important, rest, held)]
        assert found["rsq"][0] < 0.8 * found["gptq"][0] and found["rsq"][0] < 0.8 * found["shuffled"][0]
        assert found["rsq"][1] > found["gptq"][1] and found["rsq"][2] > found["gptq"][2]  # the honest trade


def test_enough_tokens_always_count(tokens: Any) -> None:
    x, _, _ = tokens
    sink = torch.zeros(2000)
    sink[:20] = 1  # as first tokens are, in many networks
    known = measured(x[0], sink)
    encoder: Any = parse_technique("rsq:least=0.001")
    found, importance = encoder.moment(known), known.importance
    assert importance is not None and importance.effective(0.001, 2) * 2000 < 25
    raised = next(
        least for least in (0.001 * 1.5**k for k in range(30)) if importance.effective(least, 2) * 2000 >= 2 * 72
    )
    assert 0.001 < raised < 1
    torch.testing.assert_close(found, importance.weighted(known.inputs, raised, 2))
    few = SiteStatistics((replace(known.uses[0], tokens=100),))  # fewer than the columns: none can be spared
    assert encoder.moment(few) is few.inputs
