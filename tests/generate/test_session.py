"""The decode session: passes in pieces, rows of different lengths, rolling back, and trees of drafts."""

from __future__ import annotations

import pytest
import torch
from tests.generate.networks import KINDS, cache_of, network, prompts

from layerwise.errors import InputError


def own_scores(kind: str, text: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = network(kind).module(torch.tensor([text]), use_cache=False).logits[0]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_any_size_give_the_networks_own_scores(kind: str) -> None:
    net, text = network(kind), prompts(1, seed=41, longest=20)[0] + prompts(1, seed=42, longest=20)[0]
    with torch.inference_mode():
        session, found, place = net.session(1, len(text)), [], 0
        for count in (3, 1, 1, 4, 2, 9, 30):
            if part := text[place : place + count]:
                found.append(session.full(torch.tensor([part]))[0])
            place += count
    assert session.lengths == [len(text)]
    assert float((torch.cat(found) - own_scores(kind, text)).abs().max()) <= 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_different_lengths_do_not_see_each_other(kind: str) -> None:
    net, given = network(kind), prompts(3, seed=43)
    more = torch.tensor([[5, 6], [7, 8], [9, 10]])
    with torch.inference_mode():
        session = net.session(3, 30)
        last = session.scores(session.prefill(given))[:, -1]
        after = session.full(more)
    for row, prompt in enumerate(given):
        own = own_scores(kind, [*prompt, *more[row].tolist()])
        assert float((last[row] - own[len(prompt) - 1]).abs().max()) <= 1e-10
        assert float((after[row] - own[len(prompt) :]).abs().max()) <= 1e-10


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_what_was_rolled_back_leaves_no_trace(kind: str) -> None:
    net, prompt = network(kind), prompts(1, seed=44)[0]
    with torch.inference_mode():
        session = net.session(1, 40)
        session.prefill([prompt])
        session.full(torch.tensor([[3, 4, 5, 6, 7]]))
        session.rollback([len(prompt) + 1])
        found = session.full(torch.tensor([[8, 9]]))
    text = [*prompt, 3, 8, 9]
    assert float((found[0] - own_scores(kind, text)[-2:]).abs().max()) <= 1e-10
    for block, wanted in enumerate(cache_of(net, text)):
        for one, other in zip(session.cache.read(block, len(text)), wanted, strict=True):
            assert float((one - other).abs().max()) <= 1e-10
    with pytest.raises(ValueError, match="between 0 and 40"):
        session.rollback([41])


def test_hidden_states_at_every_exit() -> None:
    net, given = network("llama"), prompts(2, seed=46)
    seen: list[torch.Tensor] = []
    with torch.inference_mode():
        last = net.session(2, 20).prefill(given, seen)
        states = net.module(torch.tensor([given[0]]), output_hidden_states=True, use_cache=False).hidden_states
    assert len(seen) == 4 and torch.equal(seen[-1][0, len(given[0]) - 1], last[0, 0])
    for mine, theirs in zip(seen[:3], states[1:4], strict=True):
        assert float((mine[0, : len(given[0])] - theirs[0]).abs().max()) <= 1e-10


def test_a_session_is_no_longer_than_the_network() -> None:
    with pytest.raises(InputError, match="161 positions"):
        network("llama").session(1, 161)
