"""ACT: maps stay maps, only chosen heads change, and heads are kept for what they gain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.generate.networks import WORDS, network, prompts

from layerwise.engine.progress import Stopwatch
from layerwise.errors import InputError
from layerwise.generate.act import Calibration, calibrated, eligible, find_sinks, read_heads
from layerwise.generate.attention_edit import edited
from layerwise.generate.wanted import Wanted, silent
from layerwise.recipe import parse_generator


def maps(seed: int, length: int = 12, heads: int = 3) -> torch.Tensor:
    """Causal maps with a sink in the middle, [1, heads, length, length]."""
    scores = torch.randn(1, heads, length, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores[..., 4] += 4
    scores[..., 0] += 3
    return scores.masked_fill(~torch.ones(length, length).tril().bool(), float("-inf")).softmax(-1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0.5, 8))
def test_calibrated_maps_are_causal_maps(seed: int, beta: float, alpha: float) -> None:
    given_maps = maps(seed)
    sinks = find_sinks(given_maps, alpha)
    out = calibrated(given_maps, sinks, beta)
    assert not sinks[..., 0].any() and float(out.min()) >= 0
    assert float((out.sum(-1) - 1).abs().max()) <= 1e-12
    assert float(out.triu(1).abs().max()) == 0
    assert torch.equal(out[..., 0, :], given_maps[..., 0, :])
    assert torch.allclose(calibrated(given_maps, sinks, 1.0), given_maps, atol=1e-15)
    assert torch.allclose(calibrated(given_maps, sinks & False, beta), given_maps, atol=1e-15)


def test_what_a_sink_loses_goes_to_the_others_in_proportion() -> None:
    row = torch.tensor([[[[0.2, 0.5, 0.3]]]], dtype=torch.float64)
    out = calibrated(row, torch.tensor([[[False, True, False]]]), 0.4)
    assert torch.allclose(out[0, 0, 0], torch.tensor([0.2 * 1.6, 0.2, 0.3 * 1.6], dtype=torch.float64), atol=1e-15)
    whole = torch.tensor([[[[0.0, 1.0, 0.0]]]], dtype=torch.float64)  # nothing to give it to
    assert torch.equal(calibrated(whole, torch.tensor([[[False, True, False]]]), 0.4), whole)


def test_a_sink_is_what_receives_more_than_its_share() -> None:
    found = find_sinks(maps(1), 3.0)
    assert found[..., 4].all() and found[..., :4].sum() == 0
    assert find_sinks(maps(1), 3.0, first=True)[..., 0].all()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_attention_in_the_open_is_the_networks_own(kind: str) -> None:
    net, prompt = network(kind), torch.tensor([prompts(1, seed=4)[0] * 3])
    with torch.inference_mode():
        usual = net.session(1, 60)
        own = [usual.full(prompt), usual.full(prompt[:, :1]), usual.full(prompt[:, :3])]
        seen: list[int] = []

        def look(block: int, found: torch.Tensor) -> torch.Tensor:
            seen.append(block)
            return found

        with edited(net, look):
            session = net.session(1, 60)
            other = [session.full(prompt), session.full(prompt[:, :1]), session.full(prompt[:, :3])]
        again = net.session(1, 60).full(prompt)
    assert seen == [0, 1, 2, 3] * 3
    assert all(float((a - b).abs().max()) <= 1e-10 for a, b in zip(own, other, strict=True))
    assert torch.equal(again, own[0])  # and afterwards everything is as before


def test_other_heads_keep_every_bit() -> None:
    given_maps = maps(2)
    out = Calibration({1: [2]}, 3.0, 0.4)(1, given_maps)
    assert torch.equal(out[:, :2], given_maps[:, :2]) and not torch.equal(out[:, 2], given_maps[:, 2])
    assert Calibration({1: [2]}, 3.0, 0.4)(0, given_maps) is given_maps


def test_sinks_of_the_prompt_stay_sinks_behind_it() -> None:
    calibration = Calibration({0: [0]}, 3.0, 0.4)
    calibration(0, maps(3))
    row = torch.full((1, 3, 1, 14), 1 / 14, dtype=torch.float64)
    out = calibration(0, row)[0, 0, 0]
    assert out[4] == pytest.approx(0.4 / 14) and out[13] > 1 / 14 and out.sum() == pytest.approx(1)
    assert calibration.places({0: [0]}) == {0: [(0, [4])]}


def test_no_heads_and_beta_of_one_are_plain_decoding() -> None:
    net, given_prompts = network("llama"), prompts(2, seed=6)
    plain = parse_generator("plain").generate(net, given_prompts, Wanted(12), silent).tokens
    for setting in ("act:heads=none", "act:heads=all,beta=1.0,alpha=1.0"):
        assert parse_generator(setting).generate(net, given_prompts, Wanted(12), silent).tokens == plain
    changed = parse_generator("act:heads=0.0/1.1/2.2,alpha=0.5,beta=0.0").generate(
        net, given_prompts, Wanted(12), silent
    )
    assert changed.tokens != plain


def test_heads_are_kept_for_what_they_gain(tmp_path: Path) -> None:
    """The ablation: of the heads that were tried, those that were left out do not gain as those that were kept."""
    net: Any = network("llama")
    tokens = torch.randint(2, WORDS, (400,), generator=torch.Generator().manual_seed(2))
    method: Any = parse_generator("act:alpha=1.0,beta=0.0,windows=24,length=20")
    learned = method.learn(net, tokens, tmp_path, 0, Stopwatch())
    kept = read_heads(learned.heads, 4, 4)
    draw = torch.Generator().manual_seed(0)
    starts = torch.randint(0, 380, (24,), generator=draw).tolist()
    windows = torch.stack([tokens[s : s + 21] for s in starts])
    with torch.inference_mode():
        before = method._likelihood(net, windows, {}, 2).mean()
        gains = [float(method._likelihood(net, windows, {2: [head]}, 2).mean() - before) for head in range(4)]
    chosen = kept.get(2, [])
    assert all(gains[head] > 0 for head in chosen)
    assert not chosen or min(gains[h] for h in chosen) >= 0 >= min(gains)
    assert learned == method.learn(net, tokens, tmp_path, 0, Stopwatch())


def test_heads_are_read_and_refused_by_name() -> None:
    assert read_heads("2.0/1.3/2.2", 4, 4) == {2: [0, 2], 1: [3]}
    assert read_heads("all", 5, 2) == {2: [0, 1], 3: [0, 1]}
    assert [list(eligible(n)) for n in (1, 2, 3, 4, 6)] == [[0], [0], [1], [2], [2, 3, 4]]
    for text in ("", "2", "4.0", "0.4", "a.b"):
        with pytest.raises(InputError):
            read_heads(text, 4, 4)
