"""EAGLE: trees that say what their paths say, a head that is fed the right token, and its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.generate.networks import WORDS, cache_of, greedy_without_cache, network, prompts, ready
from torch import Tensor

from layerwise.engine.progress import Stopwatch
from layerwise.errors import InputError
from layerwise.generate import eagle as technique_file
from layerwise.generate.choice import Choice
from layerwise.generate.draft_head import FILE, DraftHead, load_head, recorded, run_block, save_head, train_head
from layerwise.generate.speculation import Proposal, Steady, speculate, verify
from layerwise.generate.wanted import Wanted, Work, silent
from layerwise.network import safetensors_file
from layerwise.recipe import parse_generator
from layerwise.technique import find

NEW = 16
PARENTS = (0, 0, 1, 1, 2, 3)  # two children of the root, of which each has some
TREE = Proposal([5, 7, 9, 3, 5, 11], parents=PARENTS)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "mixtral", "qwen2_moe"])
def test_a_node_has_the_scores_of_its_path_alone(kind: str) -> None:
    net, prompt = network(kind), [4, 9, 2, 8, 3, 17, 6, 12, 10, 5, 2]
    with torch.inference_mode():
        session = net.session(1, 40, spare=10)
        session.prefill([prompt])
        scores, _ = verify(session, 13, TREE)
        for node in range(len(TREE.tokens) + 1):
            path, at = [], node
            while at:
                path, at = [TREE.tokens[at - 1], *path], PARENTS[at - 1]
            alone = net.module(torch.tensor([[*prompt, 13, *path]]), use_cache=False).logits[0, -1]
            assert float((scores[node] - alone).abs().max()) <= 1e-10


def test_a_chain_is_a_tree_without_branches() -> None:
    net, prompt = network("llama"), prompts(1, seed=2)[0]
    found = []
    with torch.inference_mode():
        for parents in (None, (0, 1, 2)):
            session = net.session(1, 40)
            session.prefill([prompt])
            found.append(verify(session, 13, Proposal([5, 7, 9], parents=parents)))
    for one, other in zip(*found, strict=True):
        assert float((one - other).abs().max()) <= 1e-12


class Knowing:
    """Guesses the truth on a branch among wrong ones, so that paths have gaps."""

    def __init__(self, truth: tuple[int, ...]) -> None:
        self.truth, self.said = truth, 1

    def propose(self, session: Any, last: int, count: int, chooser: Any) -> Proposal:
        tokens: list[int] = []
        parents: list[int] = []
        right = 0
        for word in self.truth[self.said : self.said + count]:
            tokens += [(word + 1) % WORDS, word, (word + 2) % WORDS]
            parents += [right] * 3
            right = len(tokens) - 1
        return Proposal(tokens, parents=parents)

    def confirmed(self, tokens: Any, hidden: Tensor) -> None:
        assert hidden.shape[1] >= len(tokens)
        self.said += len(tokens)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_path_with_gaps_is_moved_together(kind: str) -> None:
    net, prompt = network(kind), prompts(1, seed=11)[0]
    truth = greedy_without_cache(net, prompt, NEW, stop=False)
    with torch.inference_mode():
        session = net.session(1, len(prompt) + NEW, spare=12)
        first = int(session.scores(session.prefill([prompt]))[0, -1].argmax())
        work, wanted = Work(), Wanted(NEW, ignore_stop=True)
        text = speculate(session, first, Knowing(truth), Steady(4), Choice().chooser(), wanted, work, len)
    assert tuple(text) == truth
    assert work.full_passes == -(-(NEW - 1) // 5)
    known = [*prompt, *truth[:-1]]
    for block, wanted_pair in enumerate(cache_of(net, known)):
        for one, other in zip(session.cache.read(block, len(known)), wanted_pair, strict=True):
            assert float((one - other).abs().max()) <= 1e-10


@pytest.mark.parametrize("setting", ["eagle", "eagle:width=3"])
def test_drawn_texts_are_plain_decodings_draws(setting: str) -> None:
    """Not just the same distribution: token for token, since guesses have no say in what is drawn."""
    net, given = network("llama"), prompts(3, seed=8)
    wanted = Wanted(20, Choice(temperature=0.7, top_p=0.9, seed=4), ignore_stop=True)
    assert (
        ready(setting).generate(net, given, wanted, silent).tokens
        == parse_generator("plain").generate(net, given, wanted, silent).tokens
    )


@pytest.mark.parametrize("width", [1, 3])
def test_only_true_features_outlive_a_round(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the head's cache holds at the start of a round is what one pass over all true pairs makes."""
    net, prompt = network("llama"), prompts(1, seed=9)[0]
    seen: list[int] = []
    known: dict[int, list[Any]] = {}
    Levels = technique_file.Levels
    confirmed, feed = Levels.confirmed, Levels._feed_known

    def confirming(self: Any, tokens: Any, hidden: Tensor) -> None:
        confirmed(self, tokens, hidden)
        known.setdefault(id(self), []).append(self.pending[-1])

    def feeding(self: Any) -> int:
        count = feed(self)
        words = [w for found, _ in known[id(self)] for w in found]
        features = torch.cat([f for _, f in known[id(self)]], 1)
        other = technique_file.Levels(net, self.head, width, prompt, net.session(1, 60))
        other.pending = [(words, features)]
        feed(other)
        for one, new in zip(self.session.cache.read(0, count), other.session.cache.read(0, count), strict=True):
            assert float((one - new).abs().max()) <= 1e-10
        seen.append(count)
        return count

    monkeypatch.setattr(Levels, "confirmed", confirming)
    monkeypatch.setattr(Levels, "_feed_known", feeding)
    generator: Any = replace(ready("eagle"), width=width)  # type: ignore[type-var]
    generator.generate(net, [prompt], Wanted(12, ignore_stop=True), silent)
    assert seen[0] == len(prompt) and len(seen) > 3


# ---------------------------------------------------------------- what the head is fed


def learned(inputs: str) -> tuple[float, float]:
    """(distance at the end of training, share of a text's next tokens that the trained head guesses).

    The texts are drawn, so that a feature says which tokens may follow and never which one did.
    """
    net = network("llama", blocks=1)
    draw = torch.Generator().manual_seed(5)
    text, held = torch.randint(2, WORDS, (3000,), generator=draw), torch.randint(2, WORDS, (8, 24), generator=draw)
    head = DraftHead(net, inputs)
    losses = train_head(net, head, text, 150, 8, 24, 0.01, 0, lambda: None)
    with torch.no_grad():
        features, embedded, wanted = recorded(net, held, inputs)
        guessed = run_block(net, head, head.mixed(embedded, features[:, :-1]))
        right = net.head(guessed.double()).argmax(-1) == wanted.argmax(-1)
    return sum(losses[-10:]) / 10, float(right.float().mean())


def test_a_head_that_knows_the_token_one_step_ahead_guesses_best() -> None:
    """The paper's ablations: against the token too late, the feature alone, and the token alone."""
    found = {name: learned(name) for name in ("shifted", "unshifted", "feature", "token")}
    assert found["shifted"][0] < min(found[other][0] for other in ("unshifted", "feature", "token"))
    assert found["shifted"][1] > 1.3 * max(found["unshifted"][1], found["feature"][1])


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    net, tokens = network("llama"), torch.arange(120) % WORDS
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        parse_generator("eagle:steps=2,batch=2,length=12").learn(net, tokens, tmp_path / name, 3, Stopwatch())
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()


# ---------------------------------------------------------------- file


def test_a_head_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    net = network("gpt2")
    head = DraftHead(net, "feature", seed=2)
    size = save_head(head, tmp_path)
    assert size == (tmp_path / FILE).stat().st_size
    found = load_head(net, tmp_path)
    assert found.inputs == "feature" and next(found.parameters()).dtype == torch.float64
    for name, value in head.state_dict().items():
        assert torch.equal(value.half().double(), found.state_dict()[name])


def test_what_is_no_head_of_this_network_is_refused(tmp_path: Path) -> None:
    net = network("llama")
    with pytest.raises(InputError, match="holds no draft head"):
        load_head(net, tmp_path)
    with pytest.raises(InputError, match="layerwise fit eagle"):
        parse_generator("eagle").generate(net, [[3]], Wanted(2), silent)
    save_head(DraftHead(network("gpt2")), tmp_path)
    with pytest.raises(InputError, match="head of another network"):
        load_head(net, tmp_path)
    good = DraftHead(net)
    values = {name: value.half() for name, value in good.state_dict().items()}
    layout = {name: (torch.float16, tuple(value.shape)) for name, value in values.items()}
    about = {"format": "layerwise draft head 1", "inputs": "shifted"}
    for metadata in ({}, {**about, "inputs": "other"}, {**about, "format": "layerwise draft head 2"}):
        safetensors_file.write(tmp_path / FILE, layout, values.items(), metadata)
        with pytest.raises(InputError, match="no draft head of this version"):
            load_head(net, tmp_path)
    values["fc.weight"] = torch.full_like(values["fc.weight"], float("nan"))
    safetensors_file.write(tmp_path / FILE, layout, values.items(), about)
    with pytest.raises(InputError, match="no numbers"):
        load_head(net, tmp_path)
    (tmp_path / FILE).write_bytes(b"not a file of tensors")
    with pytest.raises(InputError):
        load_head(net, tmp_path)


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give more text"):
        parse_generator("eagle").learn(network("llama"), torch.arange(20), tmp_path, 0, Stopwatch())


def test_papers() -> None:
    names = {"eagle": "EAGLE", "adacad": "AdaCAD", "act": "ACT", "sora": "On-device Sora"}
    assert {name: find(name).paper for name in names} == names
