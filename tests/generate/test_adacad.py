"""AdaCAD: the divergence, the contrast, and two texts that stay side by side."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.generate.networks import greedy_without_cache, network, prompts

from layerwise.generate.adacad import divergence
from layerwise.generate.wanted import Wanted, silent
from layerwise.recipe import parse_generator

SCORES = st.lists(st.floats(-20, 20), min_size=5, max_size=5).map(lambda x: torch.tensor(x, dtype=torch.float64))


@settings(max_examples=50, deadline=None)
@given(SCORES, SCORES, st.floats(-5, 5))
def test_divergence(one: torch.Tensor, other: torch.Tensor, shift: float) -> None:
    found = divergence(one, other)
    assert 0 <= found <= math.log(2) and divergence(one, one) == 0
    assert found == pytest.approx(divergence(other, one), abs=1e-12)
    assert found == pytest.approx(divergence(one + shift, other - shift), abs=1e-9)
    assert divergence(one, other, "2") == pytest.approx(found / math.log(2), abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(SCORES, SCORES)
def test_contrast_is_a_power_of_the_ratio(one: torch.Tensor, other: torch.Tensor) -> None:
    method: Any = parse_generator("adacad")
    changed, strength = method.contrast(one, other)
    p, q = one.softmax(-1), other.softmax(-1)
    wanted = p * (p / q) ** strength
    assert torch.allclose(changed.softmax(-1), wanted / wanted.sum(), atol=1e-10)


def test_adapting_contrasts_where_the_two_disagree_and_only_there() -> None:
    """The ablation: one fixed strength changes an answer on which both agree, or leaves the other as it was."""
    adaptive, half, one = (
        parse_generator(f"adacad:{o}") for o in ("adapt=true", "adapt=false,alpha=0.2", "adapt=false,alpha=1.0")
    )
    # Both find token 0 likeliest; the context takes a little of it away.
    agreed = torch.tensor([0.50, 0.42, 0.08]).log(), torch.tensor([0.62, 0.30, 0.08]).log()
    # The context says 1, the network is sure of 0.
    torn = torch.tensor([0.52, 0.47, 0.01]).log(), torch.tensor([0.97, 0.02, 0.01]).log()
    said = {
        name: [int(method.contrast(*pair)[0].argmax()) for pair in (agreed, torn)]  # type: ignore[attr-defined]
        for name, method in {"adaptive": adaptive, "weak": half, "strong": one}.items()
    }
    assert said["adaptive"] == [0, 1]
    assert said["strong"] == [1, 1]
    assert parse_generator("adacad:floor=0.9").contrast(*agreed)[1] == 0.9  # type: ignore[attr-defined]


def test_without_a_context_it_is_plain_decoding() -> None:
    net, asked = network("llama"), prompts(2, seed=3)
    plain = parse_generator("plain").generate(net, asked, Wanted(15), silent).tokens
    bare = tuple(map(tuple, asked))
    for setting in ("adacad", "adacad:adapt=false,alpha=1.0"):
        for wanted in (Wanted(15), Wanted(15, bare=bare)):
            assert parse_generator(setting).generate(net, asked, wanted, silent).tokens == plain
    with_context = [[7, 9, *prompt] for prompt in asked]
    forced = parse_generator("adacad:adapt=false,alpha=0.0").generate(net, with_context, Wanted(15, bare=bare), silent)
    assert forced.tokens == parse_generator("plain").generate(net, with_context, Wanted(15), silent).tokens


def test_both_texts_grow_together() -> None:
    """Every token is the contrast of two passes over the two texts anew, without a cache."""
    net, bare = network("llama"), prompts(1, seed=5)[0]
    prompt, method = [7, 9, 30, 4, *bare], parse_generator("adacad")
    found = method.generate(net, [prompt], Wanted(12, bare=(tuple(bare),), ignore_stop=True), silent)
    text: list[int] = []
    strengths = []
    for _ in range(12):
        scores = [net.module(torch.tensor([[*t, *text]]), use_cache=False).logits[0, -1] for t in (prompt, bare)]
        changed, strength = method.contrast(*scores)  # type: ignore[attr-defined]
        text.append(int(changed.argmax()))
        strengths.append(strength)
    assert found.tokens[0] == tuple(text)
    assert found.notes["mean_strength"] == [pytest.approx(sum(strengths) / 12, abs=1e-4)]
    assert min(strengths) > 0 and tuple(text) != greedy_without_cache(net, prompt, 12, stop=False)
