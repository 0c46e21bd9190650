"""Which blocks draft: the cost, the choice on the prompt, and giving up where drafting does not pay."""

from __future__ import annotations

import pytest
import torch
from tests.generate.networks import network, prompts
from torch import nn

from layerwise.errors import InputError
from layerwise.generate.network import CausalNetwork, causal_network
from layerwise.generate.own_drafts import Cost, Following, agreement, fixed_plan, read_blocks
from layerwise.generate.wanted import Wanted, silent
from layerwise.recipe import parse_generator


def test_the_cost_of_a_round_by_hand() -> None:
    exit = Cost(block=10, head=5, blocks=4, drafting=1, depth=1)
    assert exit.plain == 45
    assert exit.round(3) == 4 * 10 + 3 * 5 + 3 * 10 + 5  # the last draft is fed too, for the token behind it
    skip = Cost(block=10, head=5, blocks=4, drafting=3, depth=0)
    assert skip.round(2) == 2 * (30 + 5) + 45
    assert exit.gain(1.0, 3) == pytest.approx(4 * 45 / 90)
    assert exit.gain(0.5, 2) == pytest.approx(1.75 * 45 / exit.round(2))


def test_no_drafts_where_they_do_not_pay() -> None:
    cost = Cost(block=10, head=5, blocks=4, drafting=3, depth=3)
    assert cost.best(0.3, 8) == 0 and cost.gain(0.3, 0) == 1
    assert Cost(block=10, head=1, blocks=12, drafting=2, depth=2).best(0.9, 8) > 3


def test_drafting_stops_below_the_floor() -> None:
    cost = Cost(block=10, head=1, blocks=12, drafting=1, depth=1)
    pace = Following(cost, fixed=4, most=8, floor=0.2, agreed=8, tried=10)
    for _ in range(4):
        assert pace.count() == 4
        pace.seen(4, 0)
    pace.seen(4, 3)
    assert pace.count() == 0
    never = Following(cost, fixed=4, most=8, floor=0.0, agreed=8, tried=10)
    for _ in range(9):
        never.seen(4, 0)
    assert never.count() == 4


def test_the_pace_follows_what_is_accepted() -> None:
    cost = Cost(block=10, head=1, blocks=12, drafting=1, depth=1)
    pace = Following(cost, fixed=0, most=8, floor=0.0, agreed=8.0, tried=10.0)
    start = pace.count()
    for _ in range(30):
        pace.seen(4, 4)
    assert pace.count() > start > 0
    for _ in range(60):
        pace.seen(4, 0)
    assert pace.count() <= 1 < start


@pytest.fixture(scope="module")
def idle() -> CausalNetwork:
    """Four blocks of which the second and the third do nothing: drafts without them are the network itself."""
    net = network("llama")
    import copy

    module = copy.deepcopy(net.module)
    for block in module.model.layers[1:3]:  # type: ignore[index, union-attr]
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            nn.init.zeros_(linear.weight)
    return causal_network(module)


def test_blocks_that_do_nothing_are_found_and_skipped(idle: CausalNetwork) -> None:
    prompt = prompts(1, seed=21, longest=30)
    wanted = Wanted(24, ignore_stop=True)
    plain = parse_generator("plain").generate(idle, prompt, wanted, silent)
    found = parse_generator("self_speculative:draft=skip").generate(idle, prompt, wanted, silent)
    assert found.tokens == plain.tokens
    assert "skip 1/2 of 4" in str(found.notes["drafts"])
    assert found.work.drafted == found.work.accepted > 0
    assert found.work.full_passes < 0.6 * plain.work.full_passes


def test_the_choice_on_the_prompt_beats_any_other_pair(idle: CausalNetwork) -> None:
    """The ablation of choosing by states: as many other blocks skipped are refused more often."""
    prompt = prompts(3, seed=22, longest=20)
    wanted = Wanted(20, ignore_stop=True)
    passes = {
        blocks: parse_generator(f"self_speculative:skip={blocks},tokens=3,floor=0")
        .generate(idle, prompt, wanted, silent)
        .work.full_passes
        for blocks in ("1/2", "0/1", "2/3", "0/3")
    }
    assert min(passes, key=lambda blocks: passes[blocks]) == "1/2"
    assert passes["1/2"] < 0.5 * min(count for blocks, count in passes.items() if blocks != "1/2")


def test_agreement_of_drawn_tokens_is_what_two_distributions_share() -> None:
    from layerwise.generate.choice import Choice

    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.3, 0.5]])
    assert agreement(p.log(), q.log(), Choice(temperature=1.0)) == pytest.approx([0.7])
    assert agreement(p.log(), q.log(), Choice()) == [0.0]


def test_blocks_are_read_and_refused_by_name() -> None:
    assert read_blocks("1-2/5", 8) == {1, 2, 5}
    net = network("llama")
    assert fixed_plan(net, "auto", 0, "auto") is None
    assert fixed_plan(net, "auto", 2, "auto") == ((0, 1), 2)
    assert fixed_plan(net, "skip", 0, "2") == ((0, 1, 3), 0)
    for draft, depth, skip in (("skip", 1, "auto"), ("exit", 0, "1"), ("auto", 4, "auto"), ("auto", 0, "0-3")):
        with pytest.raises(InputError):
            fixed_plan(net, draft, depth, skip)


def test_networks_that_are_more_than_their_parts_are_refused() -> None:
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, final_logit_softcapping=1.0, query_pre_attn_scalar=16,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = transformers.Gemma2ForCausalLM(config).eval()
    with pytest.raises(InputError, match="cannot run the blocks of a Gemma2ForCausalLM"):
        causal_network(module)
