"""Draft and verify with drafts of every quality: the tokens, the passes, the cache, and the distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.generate.networks import WORDS, Always, Scripted, cache_of, greedy_without_cache, network, prompts
from torch import Tensor

from layerwise.generate.choice import Choice
from layerwise.generate.own_drafts import OwnDraft
from layerwise.generate.session import Session
from layerwise.generate.speculation import Proposal, judge, speculate
from layerwise.generate.wanted import Wanted, Work

NEW = 14


def drafts_of(prompt: list[int], truth: tuple[int, ...], worst: Callable[[list[int]], int]) -> dict[str, Any]:
    after = [*prompt, *truth, *[0] * 20]
    random = torch.Generator().manual_seed(1)
    first = [*prompt, truth[0]]
    return {
        "oracle": Scripted(lambda text: after[len(text)], first),
        "random": Scripted(lambda _: int(torch.randint(WORDS, (), generator=random)), first),
        "copy": Scripted(lambda text: text[-1], first),
        "worst": Scripted(worst, first),
        "exit": OwnDraft((0, 1), 2),
        "all but the last": OwnDraft((0, 1, 2), 3),
        "skip": OwnDraft((0, 2, 3), 0),
    }


DRAFTS = ("oracle", "random", "copy", "worst", "exit", "all but the last", "skip")
CASES = [("llama", name) for name in DRAFTS] + [("gpt2", name) for name in DRAFTS]
CASES += [(kind, name) for kind in ("mistral", "mixtral", "qwen2_moe") for name in ("exit", "skip")]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_any_draft_gives_the_tokens_of_greedy_decoding(kind: str, name: str) -> None:
    net, prompt = network(kind), prompts(1, seed=11)[0]
    truth = greedy_without_cache(net, prompt, NEW, stop=False)
    after = [*prompt, *truth, *[0] * 20]
    for number in (1, 2, 4, 8) if kind in ("llama", "gpt2") else (3,):
        draft = drafts_of(prompt, truth, lambda text: (after[len(text)] + 1) % WORDS)[name]
        with torch.inference_mode():
            session = net.session(1, len(prompt) + NEW)
            first = int(session.scores(session.prefill([prompt]))[0, -1].argmax())
            work, checked = Work(), checking(session, net, prompt, truth)
            text = speculate(
                session, first, draft, Always(number), Choice().chooser(), Wanted(NEW, ignore_stop=True), work, checked
            )
        assert tuple(text) == truth
        if name == "oracle":
            assert work.full_passes == -(-(NEW - 1) // (number + 1)) and work.accepted == work.drafted
        if name == "worst":
            assert work.full_passes == NEW - 1 and work.accepted == 0
        assert work.full_passes + work.accepted == NEW - 1


def checking(session: Session, net: Any, prompt: list[int], truth: tuple[int, ...]) -> Callable[[Any], None]:
    """After each round: all but the newest token are in the cache, exactly as one pass would have put them."""
    said: list[int] = []

    def emit(tokens: Any) -> None:
        said.extend(tokens)
        assert session.lengths == [len(prompt) + len(said) - 1]
        if len(said) in (1, len(truth)):
            return  # the ends are compared in the rounds between
        for block, wanted in enumerate(cache_of(net, [*prompt, *truth[: len(said) - 1]])):
            for one, other in zip(session.cache.read(block, session.lengths[0]), wanted, strict=True):
                assert float((one - other).abs().max()) <= 1e-10

    return emit


def test_an_exit_reuses_what_it_has_computed() -> None:
    """Verification of an exit's draft runs the other blocks only, and the last states are those of a full pass."""
    net, prompt = network("llama"), prompts(1, seed=12)[0]
    with torch.inference_mode():
        session = net.session(1, 40)
        session.prefill([prompt])
        proposal = OwnDraft((0, 1), 2).propose(session, 5, 3, Choice().chooser())
        assert proposal.hidden is not None and proposal.hidden.shape[1] == 4 and proposal.block_passes == 8
        split = session.run(proposal.hidden, range(2, 4), session.lengths)
        other = net.session(1, 40)
        other.prefill([prompt])
        whole = other.run(other.embed(torch.tensor([[5, *proposal.tokens]]), other.lengths), range(4), other.lengths)
    assert float((split - whole).abs().max()) <= 1e-12


def test_stale_keys_change_the_tokens() -> None:
    """The ablation of rolling back: a loop that keeps rejected positions says something else."""
    net, changed = network("llama"), 0
    for prompt in prompts(4, seed=13):
        truth = greedy_without_cache(net, prompt, NEW, stop=False)
        with torch.inference_mode():
            session = net.session(1, 150)
            first = int(session.scores(session.prefill([prompt]))[0, -1].argmax())
            keep = session.rollback
            session.rollback = lambda lengths, s=session, keep=keep: keep([s.lengths[0] + 3])  # type: ignore[method-assign]
            draft = Scripted(lambda text: 7, [*prompt, first])
            text = speculate(
                session, first, draft, Always(2), Choice().chooser(), Wanted(NEW, ignore_stop=True), Work(), len
            )
        changed += tuple(text) != truth
    assert changed >= 3


# ---------------------------------------------------------------- drawing

P = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
Q = torch.tensor([0.1, 0.5, 0.1, 0.05, 0.25], dtype=torch.float64)
DRAWS = 6_000


def chi_square(counts: Tensor, expected: Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_keep_or_replace_is_the_target_by_enumeration() -> None:
    kept = torch.minimum(P, Q)
    rest = (P - Q).clamp(min=0)
    assert torch.allclose(kept + (1 - kept.sum()) * rest / rest.sum(), P, atol=1e-15)


@pytest.mark.parametrize("likely", [Q, None], ids=["drawn drafts", "certain drafts"])
def test_drawn_tokens_have_the_networks_distribution(likely: Tensor | None) -> None:
    chooser, counts, kept = Choice(temperature=1.0, seed=1).chooser(), torch.zeros(5), 0
    after = torch.zeros(5)
    scores = torch.stack([P.log(), P.flip(0).log()])
    for _ in range(DRAWS):
        token = chooser.draw(Q) if likely is not None else 1
        proposal = Proposal([token], None if likely is None else likely[None])
        said, path = judge(scores, proposal, chooser)
        counts[said[0]] += 1
        kept += len(path) - 1
        if len(path) > 1:
            assert said[0] == token
            after[said[1]] += 1
    assert chi_square(counts, P * DRAWS) < 18.5  # 4 degrees of freedom: one in a thousand
    assert chi_square(after, P.flip(0) * kept) < 18.5
    assert abs(kept / DRAWS - float(torch.minimum(P, Q).sum() if likely is not None else P[1])) < 0.025


def test_keeping_every_draft_would_not() -> None:
    """The ablation: without the test, drafts would come out as they were drawn."""
    chooser, counts = Choice(temperature=1.0, seed=2).chooser(), torch.zeros(5)
    for _ in range(DRAWS // 4):
        counts[chooser.draw(Q)] += 1
    assert chi_square(counts, P * DRAWS / 4) > 100


def test_a_whole_run_draws_from_the_network() -> None:
    """Three tokens behind one prompt, over a vocabulary of 5: texts of three against the network's own products."""
    from layerwise.generate.wanted import silent
    from layerwise.recipe import parse_generator

    net, prompt, runs = network("llama", 2, 5), [2, 4, 3], 600
    choice = Choice(temperature=2.5, seed=9)
    with torch.inference_mode():
        first = choice.probabilities(net.module(torch.tensor([prompt])).logits[0, -1])
        second = choice.probabilities(net.module(torch.tensor([[*prompt, t] for t in range(5)])).logits[:, -1])
        third = choice.probabilities(
            net.module(torch.tensor([[*prompt, a, b] for a in range(5) for b in range(5)])).logits[:, -1]
        )
    expected = (first[:, None] * second)[:, :, None] * third.view(5, 5, 5)
    generator = parse_generator("self_speculative:exit=1,tokens=2,floor=0")
    found = generator.generate(net, [prompt] * runs, Wanted(3, choice, ignore_stop=True), silent)
    assert 0 < found.work.accepted < found.work.drafted
    counts = torch.zeros(5, 5, 5)
    for a, b, c in found.tokens:
        counts[a, b, c] += 1
    usual = expected * runs >= 4
    rest, of_rest = expected[~usual].sum() * runs, counts[~usual].sum()
    value = chi_square(counts[usual], expected[usual] * runs) + float((of_rest - rest) ** 2 / rest.clamp(min=1e-9))
    freedom = int(usual.sum())
    assert value < freedom + 3.3 * (2 * freedom) ** 0.5 + 3
