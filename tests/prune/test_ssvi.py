"""SSVI: its formulas against torch and against draws, counts that stay, and what certainty and moves are worth."""

from __future__ import annotations

import math

import pytest
import torch
from tests.contract.test_sparsifiers import pictures
from torch import nn

from layerwise.prune._gaussian import Gaussian, divergence, inverse_softplus, mean_size, size_over_noise
from layerwise.prune.sparsified import Examples
from layerwise.recipe import parse_sparsifier
from layerwise.trials.sparsifiers import Digits, calibration_error, drawn, loss_and_error, perceptron


def test_size_over_noise_ranks_exactly_as_mean_over_deviation() -> None:
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(400, generator=generator, dtype=torch.float64)
    sigma = torch.rand(400, generator=generator, dtype=torch.float64) * 2 + 0.2
    assert torch.equal(size_over_noise(mu, sigma).argsort(), (mu.abs() / sigma).argsort())
    at_zero = size_over_noise(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    assert float(at_zero) == pytest.approx(1 / math.sqrt(math.pi / 2 - 1), abs=1e-9) == pytest.approx(1.3236, abs=1e-4)
    scaled = size_over_noise(3 * mu, 3 * sigma)
    torch.testing.assert_close(scaled, size_over_noise(mu, sigma))


def test_mean_size_is_what_draws_give() -> None:
    draws = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for mu, sigma in ((0.0, 1.0), (0.3, 0.5), (-2.0, 0.7)):
        wanted = float((mu + sigma * draws).abs().mean())
        assert float(mean_size(torch.tensor(mu), torch.tensor(sigma))) == pytest.approx(wanted, rel=5e-3)


def test_divergence_is_torchs() -> None:
    mu, sigma = torch.tensor([0.0, 0.3, -1.0]), torch.tensor([0.1, 0.7, 2.0])
    normal = torch.distributions.Normal
    wanted = torch.distributions.kl_divergence(normal(mu, sigma), normal(0.0, 0.4))
    torch.testing.assert_close(divergence(mu, sigma, 0.4), wanted)
    torch.testing.assert_close(nn.functional.softplus(inverse_softplus(sigma)), sigma)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_outputs_have_the_mean_and_spread_of_drawn_weights_and_no_spread_is_the_mean_network(kind: str) -> None:
    layer: nn.Linear | nn.Conv2d = nn.Linear(6, 3) if kind == "linear" else nn.Conv2d(2, 3, 3)
    x = torch.rand(1, 6) if kind == "linear" else torch.rand(1, 2, 3, 3)
    mask = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    with torch.no_grad():
        layer.weight.mul_(mask)
    generator = torch.Generator().manual_seed(0)
    member = Gaussian(layer, mask, torch.zeros(layer.weight.shape), generator)
    many = member(x.expand(20_000, *x.shape[1:])).detach().flatten(1)
    variance = member.product(x.square(), member.sigma.square()).flatten()
    torch.testing.assert_close(many.mean(0), layer(x).flatten(), atol=0.05, rtol=0)
    torch.testing.assert_close(many.var(0), variance, rtol=0.05, atol=0.01)
    still = Gaussian(layer, mask, torch.full(layer.weight.shape, -60.0), generator)
    torch.testing.assert_close(still(x), layer(x), atol=1e-3, rtol=0)


def data(count: int) -> Digits:
    pixels, labels = pictures(count)
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(7))
    pixels, half = pixels + 0.3 * noise, count // 2
    return Digits(pixels[:half], labels[:half], pixels[half:], labels[half:])


def test_counts_stay_and_two_values_are_stored_for_every_weight() -> None:
    seen, module = data(200), drawn(0, lambda: perceptron((24, 16)))
    found = parse_sparsifier("ssvi:steps=30,every=5,density=0.2").sparsify(
        Examples(module, seen.pixels, seen.labels, 0)
    )
    assert [int(m.sum()) for m in found.masks.values()] == [round(0.2 * m.numel()) for m in found.masks.values()]
    assert found.figures["weights moved"] > 0
    kept = sum(int(m.sum()) for m in found.masks.values())
    biases = sum(p.numel() for n, p in found.module.named_parameters() if n not in found.masks)
    positions = sum(len(m) * -(-m[0].numel() // 8) for m in found.masks.values())
    assert found.nbytes == 2 * 2 * kept + 2 * biases + positions
    inner = parse_sparsifier("ssvi:steps=3,ends=false").sparsify(Examples(module, seen.pixels, seen.labels, 0))
    assert len(inner.masks) == 1 and len(found.masks) == 3


def test_certainty_and_moves_are_worth_their_while() -> None:
    """The ablation: the mask that stays as it was drawn, and weights that go at random, end with a higher loss."""
    seen, module = data(800), drawn(0, lambda: perceptron((48, 24)))
    losses = {}
    for text in ("", ",out=random", ",into=none"):
        totals = 0.0
        for seed in (0, 1):
            setting = parse_sparsifier(f"ssvi:steps=200,density=0.05,every=10{text}")
            found = setting.sparsify(Examples(module, seen.pixels, seen.labels, seed))
            totals += loss_and_error(found, seen, seed)[0]
        losses[text] = totals
    assert losses[""] < losses[",into=none"] and losses[""] < losses[",out=random"], losses


def test_calibration_error_of_known_chances() -> None:
    chances = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    assert calibration_error(chances, torch.tensor([0, 0, 0, 1])) == pytest.approx((2 * 0.1 + 2 * 0.1) / 4)
