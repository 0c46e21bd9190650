"""EdgeQAT: both terms are what they say they are, without them it is LSQ, and they keep what they are meant to keep."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from tests.tune.forms import classifier, normal, rounded
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from layerwise.calibrate.attention import Attention, watching_attention
from layerwise.encoding.grid import Grid
from layerwise.errors import InputError
from layerwise.tune._attention_terms import attended_loss, map_distance, pairs, scores, spread_loss
from layerwise.tune.edgeqat import Edgeqat
from layerwise.tune.lsq import Lsq
from layerwise.tune.network import TunedNetwork

WIDTH, HEADS, LENGTH = 32, 4, 12


def noted(query: Tensor, key: Tensor, mask: Tensor | None = None, causal: bool = False) -> Attention:
    return Attention(query, key, key, mask, causal, query.shape[-1] ** -0.5, query)


def attentive(bits: int = 2) -> TunedNetwork:
    """One attention with shared key heads and a head of 16 classes for each token, rounded to nearest; loss KL."""
    mix = normal(WIDTH, 8, seed=2)
    inputs = [normal(4, LENGTH, 8, seed=10 + i) @ mix.T + 0.3 * normal(4, LENGTH, WIDTH, seed=20 + i) for i in range(3)]
    shapes = {"q": WIDTH, "k": WIDTH // 2, "v": WIDTH // 2, "head": 16}
    weights = {name: normal(rows, WIDTH, seed=i) * 0.15 for i, (name, rows) in enumerate(shapes.items())}

    def forward(given: Mapping[str, Tensor], part: int) -> Tensor:
        x = inputs[part]
        q, k, v = ((x @ given[n].T).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for n in "qkv")
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return ((x + out.transpose(1, 2).flatten(2)) @ given["head"].T).flatten(0, 1)

    def divergence(dense: Tensor, other: Tensor) -> Tensor:
        p, q = dense.log_softmax(-1), other.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)

    forms = {name: rounded(w, Grid(bits, 16)) for name, w in weights.items()}
    return TunedNetwork(
        forms, weights, len(inputs), forward, lambda part: forward(weights, part), divergence, lambda: None, 11
    )


def drawn(seed: int = 0) -> Attention:
    return noted(normal(2, 4, 5, 8, seed=seed), normal(2, 2, 5, 8, seed=seed + 1), causal=True)


def test_the_gradient_of_the_spread_is_the_closed_form_up_to_the_cap() -> None:
    """dL_E / du = -(1/E) 2 (u - mean) / ((d - 1) (1 + var)), over the mean's count; none above the teacher's spread."""
    theirs = noted(normal(1, 2, 3, 8), normal(1, 2, 3, 8, seed=1))
    query = (theirs.query * torch.tensor([0.5, 2.0])[None, :, None, None]).requires_grad_()
    loss = spread_loss([noted(query, theirs.key)], [theirs])
    loss.backward()  # type: ignore[no-untyped-call]
    variance = torch.cat([torch.minimum(query.var(-1), theirs.query.var(-1)), theirs.key.var(-1)]).detach()
    mean = variance.log1p().mean()
    assert loss.item() == pytest.approx(-math.log(float(mean)), rel=1e-6)
    q = query.detach()
    wanted = -2 * (q - q.mean(-1, keepdim=True)) / (7 * (1 + q.var(-1, keepdim=True))) / (mean * variance.numel())
    assert query.grad is not None and torch.allclose(query.grad[:, 0], wanted[:, 0], atol=1e-7)
    assert not query.grad[:, 1].any()


def test_the_spread_does_not_know_a_constant_and_a_constant_vector_is_finite() -> None:
    theirs = drawn()
    mine = noted(theirs.query * 0.7, theirs.key * 0.7)
    moved = noted(mine.query + 3.0, mine.key - 5.0)
    assert torch.allclose(spread_loss([mine], [theirs]), spread_loss([moved], [theirs]), atol=1e-5)
    assert torch.isfinite(spread_loss([noted(theirs.query * 0, theirs.key * 0)], [theirs]))


def test_maps_agree_where_scores_are_proportional_and_only_there() -> None:
    theirs = drawn()
    same = noted(theirs.query * 3, theirs.key * 0.1, causal=True)
    assert float(map_distance([same], [theirs])) == pytest.approx(0, abs=1e-6)
    assert float(map_distance([drawn(7)], [theirs])) > 0.1
    opposite = noted(-theirs.query, theirs.key, causal=True)
    assert float(map_distance([opposite], [theirs])) == pytest.approx(-math.log(1e-3))
    shared = scores(theirs)
    assert torch.allclose(shared[1, 3], theirs.query[1, 3] @ theirs.key[1, 1].T, atol=1e-5)


@pytest.mark.parametrize("additive", [False, True])
def test_padding_and_the_future_do_not_count(additive: bool) -> None:
    kept = torch.tensor([[True] * 5, [False, True, True, True, True]])  # padded on the left
    mask = torch.ones(5, 5, dtype=torch.bool).tril() & kept[:, None, None, :]
    given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
    theirs = drawn()
    theirs = noted(theirs.query, theirs.key, given)
    assert torch.equal(pairs(theirs), mask & kept[:, None, :, None])
    query, key = theirs.query.clone(), theirs.key.clone()
    query[1, :, 0], key[1, :, 0] = 100.0, -50.0 * normal(8)
    mine = noted(query, key, given)
    assert float(map_distance([mine], [theirs])) == pytest.approx(0, abs=1e-6)
    assert torch.equal(spread_loss([mine], [theirs]), spread_loss([theirs], [theirs]))


def test_both_terms_are_added_to_the_loss() -> None:
    scope = attentive()
    weights = {path: form.decode() for path, form in scope.encoded.items()}
    losses, terms = scope.losses(weights, 1)
    with watching_attention(True) as mine:
        scope.forward(weights, 1)
    with watching_attention(True) as theirs:
        scope.forward(scope.weights, 1)
    wanted = losses / terms + 0.3 * map_distance(mine, theirs) + 0.2 * spread_loss(mine, theirs)
    assert torch.allclose(attended_loss(scope, weights, 1, 0.3, 0.2), wanted)


def test_without_both_terms_it_is_learned_steps() -> None:
    scope = classifier()
    found = Edgeqat(steps=20, maps=0, entropy=0).tune(scope)
    other = Lsq(steps=20).tune(scope)
    assert found.after == other.after < found.before
    assert all(torch.equal(found.encoded[p].decode(), form.decode()) for p, form in other.encoded.items())
    with pytest.raises(InputError, match="has no attention"):
        Edgeqat(steps=20).tune(scope)


def test_each_term_keeps_what_it_is_meant_to_keep() -> None:
    """Ablation: with a term there is less of its distance left than with the loss of the output alone."""
    scope = attentive()

    def left(tuner: Edgeqat) -> tuple[float, float]:
        found = tuner.tune(scope)
        assert found.after == scope.error({**scope.encoded, **found.encoded}) < found.before
        weights = {p: form.decode() for p, form in {**scope.encoded, **found.encoded}.items()}
        plain = [float(attended_loss(scope, weights, p, 0, 0)) for p in range(scope.parts)]
        with_maps = [float(attended_loss(scope, weights, p, 1, 0)) for p in range(scope.parts)]
        with_spread = [float(attended_loss(scope, weights, p, 0, 1)) for p in range(scope.parts)]
        return sum(with_maps) - sum(plain), sum(with_spread) - sum(plain)

    plain, maps, spread = (left(Edgeqat(steps=80, rate=0.03, maps=m, entropy=e)) for m, e in ((0, 0), (1, 0), (0, 1)))
    assert maps[0] < 0.8 * plain[0] and spread[1] < plain[1]


def test_zero_steps_change_nothing() -> None:
    found = Edgeqat(steps=0).tune(attentive())
    assert found.encoded == {} and found.before == found.after
