"""TangleNAS: one pass with mixed weights is the mixture of outputs, and the logits learn what helps unseen images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.nas.pictures import TINY, bars, tiny_task
from torch import Tensor

from layerwise.nas._space import Architecture, parameters, shapes
from layerwise.nas.network import Loose, drawn, forward, sliced
from layerwise.nas.tangle_nas import (
    Masks,
    TangleNas,
    logit_shapes,
    mean_odds,
    mixed_forward,
    probabilities,
    survival,
)
from layerwise.nas.task import Labelled

MASKS = Masks.of(TINY)
VALUES = drawn(shapes(TINY, TINY.largest), torch.Generator().manual_seed(0))


def odds_of(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float32).softmax(-1) for s in logit_shapes(TINY)]


def test_rows_are_scaled_by_the_survival_function() -> None:
    odds = [torch.tensor([0.2, 0.8]), torch.tensor([0.5, 0.5]), torch.full((2, 2), 0.5)]
    mixed = MASKS.mix({"norm.weight": torch.ones(32)}, odds)["norm.weight"]
    assert torch.allclose(mixed, torch.cat([torch.ones(16), torch.full((16,), 0.8)]))
    assert torch.allclose(survival(TINY, odds), torch.tensor([1.0, 0.5]))


def test_mixed_weights_give_the_mixture_of_outputs() -> None:
    """Of a linear whose rows, columns and inner width are chosen: to 1e-6 of the sum over all choices."""
    odds = odds_of(1)
    name, x = "blocks.0.up", torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    mixed = MASKS.mix({f"{name}.{leaf}": VALUES[f"{name}.{leaf}"] for leaf in ("weight", "bias")}, odds)
    once = F.linear(x, mixed[f"{name}.weight"], mixed[f"{name}.bias"])
    each = torch.zeros_like(once)
    for j, width in enumerate(TINY.widths):
        for k, ratio in enumerate(TINY.ratios):
            inner = width * ratio
            weight, bias = VALUES[f"{name}.weight"][:inner, :width], VALUES[f"{name}.bias"][:inner]
            out = F.pad(F.linear(x[:, :width], weight, bias), (0, once.shape[1] - inner))
            each += odds[0][j] * odds[2][0, k] * out
    assert torch.allclose(once, each, atol=1e-6)


def test_the_gradient_of_a_probability_is_the_product_with_its_slice() -> None:
    weight = {"blocks.0.query.weight": VALUES["blocks.0.query.weight"].clone().requires_grad_()}
    odds = [o.clone().requires_grad_() for o in odds_of(3)]
    mixed = MASKS.mix(weight, odds)["blocks.0.query.weight"]
    outer = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(4))
    (gradient,) = torch.autograd.grad((mixed * outer).sum(), odds[0])
    for j, width in enumerate(TINY.widths):
        slices = (weight["blocks.0.query.weight"].detach() * outer)[:width, :width].sum()
        assert float(gradient[j]) == pytest.approx(float(slices), abs=1e-4)


@pytest.mark.parametrize("architecture", list(TINY.architectures()), ids=str)
def test_one_hot_probabilities_are_the_sliced_network(architecture: Architecture) -> None:
    ratios = [*architecture.ratios, *(1,) * (2 - architecture.depth)]
    odds = [
        torch.tensor([float(w == architecture.width) for w in TINY.widths]),
        torch.tensor([float(d == architecture.depth) for d in TINY.depths]),
        torch.tensor([[float(r == ratio) for r in TINY.ratios] for ratio in ratios]),
    ]
    pixels = bars(7).pixels
    alone = sliced(VALUES, shapes(TINY, architecture))
    assert torch.allclose(
        mixed_forward(VALUES, MASKS, odds, pixels),
        forward(Loose(alone), TINY, architecture.depth, pixels),
        atol=1e-5,
    )
    assert float(MASKS.expected(odds)) == parameters(TINY, architecture)


@pytest.mark.parametrize("estimator", ["darts", "gdas", "drnas"])
def test_draws_are_probabilities_with_gradients(estimator: str) -> None:
    logits = [torch.zeros(s, requires_grad=True) for s in logit_shapes(TINY)]
    state = torch.get_rng_state()
    odds = probabilities(logits, estimator, torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())
    for row, leaf in zip(odds, logits, strict=True):
        assert torch.allclose(row.sum(-1), torch.ones(row.shape[:-1]), atol=1e-5) and float(row.min()) >= -1e-6
        assert torch.allclose(mean_odds(leaf, estimator).sum(-1), torch.ones(leaf.shape[:-1]))
    sum((row * torch.arange(row.shape[-1])).sum() for row in odds).backward()  # type: ignore[union-attr]
    assert all(leaf.grad is not None and bool(leaf.grad.abs().sum() > 0) for leaf in logits)
    if estimator == "gdas":
        assert all(bool(((row == 0) | (row - 1).abs().lt(1e-6)).all()) for row in odds)


def test_the_logits_learn_and_without_learning_the_choice_is_blind() -> None:
    """A large price makes narrow widths likely; where the logits do not learn they stay even, whatever the price."""
    task = replace(tiny_task(steps=40), limit=0.25)
    learnt = dict(TangleNas(price=20.0, choice_rate=0.3).search_in(task).seen)
    even = dict(TangleNas(price=20.0, choice_rate=0.3, learn="none").search_in(task).seen)
    assert learnt["width 16"] > 0.6 and even["width 16"] == pytest.approx(0.5)


def test_logits_learn_from_images_that_the_weights_do_not_see() -> None:
    """With other labels on the validation images other logits come out; ``learn=train`` does not look at them."""
    task = tiny_task(steps=20)
    wrong = replace(task, valid=Labelled(task.valid.pixels, (task.valid.labels + 1) % 3))
    for learn, same in (("valid", False), ("train", True)):
        one, other = (TangleNas(learn=learn).search_in(t).seen for t in (task, wrong))
        assert (one == other) is same
