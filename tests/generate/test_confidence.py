"""Drafts that end where they are not sure: the rule by hand, what it is worth, and that it changes no distribution."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.generate.networks import network, prompts, ready
from torch import Tensor

from layerwise.engine.progress import Stopwatch
from layerwise.generate.choice import Choice
from layerwise.generate.confidence import Confidence, sureness
from layerwise.generate.network import CausalNetwork, causal_network
from layerwise.generate.own_drafts import Cost, Following
from layerwise.generate.wanted import Wanted, silent
from layerwise.recipe import parse_generator


def test_the_rule_by_hand() -> None:
    found = Confidence(price=0.25, kept=4.0, hoped=5.0)
    found.begin()
    assert found.possible and found.pays(0.4) and not found.pays(0.3)  # 0.8 * 0.4 and 0.8 * 0.3 against 0.25
    found.took(0.5)
    assert found.path == pytest.approx(0.4) and found.pays(0.8) and not found.pays(0.7)
    found.took(0.9)
    found.told(1)
    assert found.kept == pytest.approx(0.95 * 4 + 1) and found.hoped == pytest.approx(0.95 * 5 + 0.5 + 0.9)
    before = found.kept, found.hoped
    found.begin()
    found.told(0)  # a round without a draft says nothing
    assert (found.kept, found.hoped) == before


def test_a_draft_that_is_sure_of_nonsense_is_not_asked_again() -> None:
    found = Confidence(price=0.3, kept=9.0, hoped=9.0)
    pace = Following(Cost(10, 1, 4, 1, 1), 0, 8, 0.2, 9, 9, found)
    rounds = 0
    while pace.count() and rounds < 100:
        found.begin()
        found.took(0.99)
        found.told(0)
        rounds += 1
    assert 10 < rounds < 40 and not found.possible


def test_a_price_is_one_more_token_of_the_draft() -> None:
    cost = Cost(block=10, head=5, blocks=4, drafting=1, depth=1)
    assert cost.price == pytest.approx((cost.round(3) - cost.round(2)) / cost.plain)
    assert cost.gain_of(0.0, 0.0) == pytest.approx(1 / (1 + 5 / 45))
    assert cost.gain_of(1.0, 1.0) == pytest.approx(1 / cost.price)
    assert cost.gain_of(0.5, 0.45) > cost.gain_of(1.0, 0.5)  # fewer drafts, of which more are right


def test_sureness_is_the_largest_probability() -> None:
    assert sureness(torch.tensor([1.0, 3.0, 2.0])) == pytest.approx(float(torch.tensor([1.0, 3.0, 2.0]).softmax(0)[1]))


@pytest.fixture(scope="module")
def half_idle() -> CausalNetwork:
    """Blocks behind the first that change little: the first one is right more often the surer it is."""
    module = copy.deepcopy(network("llama").module)
    with torch.no_grad():
        for block in module.model.layers[1:]:  # type: ignore[index, union-attr]
            block.self_attn.o_proj.weight.mul_(0.25)
            block.mlp.down_proj.weight.mul_(0.25)
    return causal_network(module)


def test_drafts_that_end_by_themselves_are_refused_less(half_idle: CausalNetwork) -> None:
    """The ablation: against drafts of one length, a larger share is kept and fewer bytes are read."""
    given, wanted = prompts(8, seed=3), Wanted(60, ignore_stop=True)
    found = {
        tokens: parse_generator(f"self_speculative:exit=1,tokens={tokens},floor=0").generate(
            half_idle, given, wanted, silent
        )
        for tokens in (0, 2, 4)
    }
    plain = parse_generator("plain").generate(half_idle, given, wanted, silent)
    assert all(f.tokens == plain.tokens for f in found.values())
    kept = {tokens: f.work.accepted / f.work.drafted for tokens, f in found.items()}
    assert kept[0] > max(kept[2], kept[4])
    assert found[0].work.read_bytes < min(found[2].work.read_bytes, found[4].work.read_bytes)


def test_read_bytes_by_hand() -> None:
    net, prompt, wanted = network("llama"), prompts(1, seed=5), Wanted(9, ignore_stop=True)
    block, head = net.read_bytes
    plain = parse_generator("plain").generate(net, prompt, wanted, silent).work
    assert plain.read_bytes == 8 * (4 * block + head)
    work = parse_generator("self_speculative:exit=1,tokens=2,floor=0").generate(net, prompt, wanted, silent).work
    assert work.read_bytes == work.block_passes * block + (work.full_passes + work.drafted) * head


# ---------------------------------------------------------------- drawing

WORDS, PROMPT, RUNS = 5, [2, 4, 3], 400


def of_three(net: CausalNetwork, choice: Choice) -> Tensor:
    """The network's own probabilities of three tokens behind the prompt, ``[words, words, words]``."""
    with torch.inference_mode():
        first = choice.probabilities(net.module(torch.tensor([PROMPT])).logits[0, -1])
        second = choice.probabilities(net.module(torch.tensor([[*PROMPT, t] for t in range(WORDS)])).logits[:, -1])
        pairs = torch.tensor([[*PROMPT, a, b] for a in range(WORDS) for b in range(WORDS)])
        third = choice.probabilities(net.module(pairs).logits[:, -1])
    return (first[:, None] * second)[:, :, None] * third.view(WORDS, WORDS, WORDS)


def made_ready(setting: str, net: CausalNetwork, folder: Path) -> Any:
    found: Any = parse_generator(setting)
    if not found.learns:
        return found
    brief = replace(found, steps=2, batch=2, length=16)  # type: ignore[type-var]
    tokens = torch.randint(0, WORDS, (200,), generator=torch.Generator().manual_seed(1))
    return brief.learn(net, tokens, folder, 0, Stopwatch())


@pytest.mark.parametrize("setting", ["self_speculative:exit=1", "eagle", "eagle:tokens=2", "eagle:width=3"])
def test_drawn_texts_have_the_networks_distribution(setting: str, tmp_path: Path) -> None:
    """Chi-square over all texts of three tokens; those expected less than four times are counted together."""
    net, choice = network("llama", 2, WORDS), Choice(temperature=2.5, seed=9)
    expected = of_three(net, choice) * RUNS
    found = made_ready(setting, net, tmp_path).generate(
        net, [PROMPT] * RUNS, Wanted(3, choice, ignore_stop=True), silent
    )
    assert 0 < found.work.accepted < found.work.drafted
    counts = torch.zeros(WORDS, WORDS, WORDS)
    for a, b, c in found.tokens:
        counts[a, b, c] += 1
    usual = expected >= 4
    rest, of_rest = expected[~usual].sum(), counts[~usual].sum()
    value = float(((counts - expected)[usual].square() / expected[usual]).sum())
    value += float((of_rest - rest) ** 2 / rest.clamp(min=1e-9))
    freedom = int(usual.sum())
    assert value < freedom + 3.3 * (2 * freedom) ** 0.5 + 3


def test_a_head_that_decides_says_what_plain_decoding_says() -> None:
    net, given, wanted = network("llama"), prompts(4, seed=6), Wanted(20, ignore_stop=True)
    plain = parse_generator("plain").generate(net, given, wanted, silent).tokens
    for width in (1, 3):
        steady: Any = replace(ready("eagle"), width=width, tokens=5)  # type: ignore[type-var]
        ending: Any = replace(steady, tokens=0)
        one, other = (g.generate(net, given, wanted, silent) for g in (steady, ending))
        assert one.tokens == other.tokens == plain
        assert other.work.drafted < one.work.drafted
