"""Early exit: its two ends, and states that wait until a later token takes them along."""

from __future__ import annotations

import pytest
import torch
from tests.generate.networks import cache_of, greedy_without_cache, network, prompts

from layerwise.generate.session import Session
from layerwise.generate.wanted import Generation, Wanted, silent
from layerwise.recipe import parse_generator


def run(setting: str, seed: int = 31, count: int = 20) -> Generation:
    return parse_generator(f"early_exit:{setting}").generate(
        network("llama"), prompts(2, seed=seed), Wanted(count, ignore_stop=True), silent
    )


def test_certain_of_nothing_is_plain_decoding() -> None:
    found = run("confidence=1")
    assert found.tokens == tuple(greedy_without_cache(network("llama"), p, 20, False) for p in prompts(2, seed=31))
    assert found.work.exited == 0 and found.work.full_passes == 2 * 19


def test_certain_of_everything_is_the_shallow_network() -> None:
    """Every token leaves: from the first one on it is the network without its last blocks, behind a full prompt."""
    found = run("confidence=0,exit=2")
    assert found.work.full_passes == 0 and found.work.exited == 2 * 19 and found.work.block_passes == 2 * 2 * 19
    net, prompt = network("llama"), prompts(2, seed=31)[0]
    text = [*prompt, found.tokens[0][0]]
    with torch.inference_mode():
        while len(text) < len(prompt) + 20:
            session = net.session(1, len(text))
            states = session.run(session.embed(torch.tensor([text]), [0]), range(2), [0])
            text.append(int(session.scores(states)[0, -1].argmax()))
    assert tuple(text[len(prompt) :]) == found.tokens[0]


def test_tokens_that_left_have_the_networks_own_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever all blocks have run, every cache is that of the text: nothing is copied from the exit upwards."""
    net, checked = network("llama"), []
    prompt = prompts(1, seed=32)[0]
    text = list(prompt)
    own_run = Session.run

    def watched(self: Session, hidden: torch.Tensor, blocks: range, starts: list[int]) -> torch.Tensor:
        out = own_run(self, hidden, blocks, starts)
        end = starts[0] + hidden.shape[1]
        if len(blocks) and blocks[-1] == 3 and blocks[0] == 2:
            checked.append((hidden.shape[1], [self.cache.read(b, end) for b in range(4)], list(text[:end])))
        return out

    monkeypatch.setattr(Session, "run", watched)
    found = parse_generator("early_exit:exit=2,confidence=0.6,waiting=5").generate(
        net, [prompt], Wanted(40, ignore_stop=True), lambda _, new: text.extend(new)
    )
    monkeypatch.undo()
    assert found.work.exited > 0 and max(count for count, _, _ in checked) > 1
    for _, own, so_far in checked[:6]:
        for one, other in zip(own, cache_of(net, so_far), strict=True):
            assert all(float((a - b).abs().max()) <= 1e-10 for a, b in zip(one, other, strict=True))


def test_a_lower_threshold_runs_fewer_blocks() -> None:
    passes = [run(f"exit=1,confidence={c}").work.block_passes for c in (1, 0.7, 0.3, 0)]
    assert passes == sorted(passes, reverse=True) and passes[0] > passes[-1]
