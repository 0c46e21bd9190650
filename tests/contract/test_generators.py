"""The laws of generators, over the registry: lossless ones are plain greedy decoding, and stops cut where they must."""

from __future__ import annotations

import pytest
from tests.generate.networks import STOP, cache_of, greedy_without_cache, network, prompts, ready

from layerwise.errors import InputError
from layerwise.generate.choice import Choice
from layerwise.generate.session import Session
from layerwise.generate.wanted import Wanted, silent
from layerwise.recipe import parse_generator
from layerwise.roles import Generator
from layerwise.technique import find, names

KINDS = ("llama", "gpt2")
SETTINGS = [
    setting for name in names(Generator) for setting in (name, *(f"{name}:{options}" for options in find(name).menu))
]
LOSSLESS = [s for s in SETTINGS if parse_generator(s).lossless]  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", LOSSLESS)
def test_lossless_ones_give_the_tokens_of_plain_greedy_decoding(setting: str, kind: str) -> None:
    net, given = network(kind), prompts(3, seed=3)
    wanted = tuple(greedy_without_cache(net, prompt, 20) for prompt in given)
    assert ready(setting, kind).generate(net, given, Wanted(20), silent).tokens == wanted


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_is_emitted_is_what_is_returned_and_never_too_much(setting: str) -> None:
    net, given = network("llama"), prompts(2, seed=4)
    for count in (1, 2, 9):
        said: dict[int, list[int]] = {0: [], 1: []}
        found = ready(setting).generate(
            net, given, Wanted(count, ignore_stop=True), lambda row, new, said=said: said[row].extend(new)
        )
        assert [tuple(said[row]) for row in (0, 1)] == list(found.tokens)
        assert [len(tokens) for tokens in found.tokens] == [count, count]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_text_ends_with_its_first_stop(setting: str) -> None:
    net = network("llama")
    for prompt in prompts(2, seed=5):
        found = ready(setting).generate(net, [prompt], Wanted(40), silent).tokens[0]
        assert STOP not in found[:-1]
        if parse_generator(setting).lossless:  # type: ignore[attr-defined]
            assert found == greedy_without_cache(net, prompt, 40)
    # A stop that the network is sure to say: whichever token it says third.
    full = ready(setting).generate(net, prompts(1), Wanted(12, ignore_stop=True), silent).tokens[0]
    import dataclasses

    stopping = dataclasses.replace(net, stop=frozenset([full[2]]))
    cut = ready(setting).generate(stopping, prompts(1), Wanted(12), silent).tokens[0]
    assert cut == full[: full.index(full[2]) + 1]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_same_seed_draws_the_same_text_whatever_is_beside_it(setting: str) -> None:
    net, given = network("llama"), prompts(2, seed=6)
    generator = ready(setting)
    wanted = Wanted(8, Choice(temperature=1.0, seed=3), ignore_stop=True)
    both = generator.generate(net, given, wanted, silent).tokens
    assert both == generator.generate(net, given, wanted, silent).tokens
    assert generator.generate(net, given[:1], wanted, silent).tokens == both[:1]
    other = Wanted(8, Choice(temperature=1.0, seed=4), ignore_stop=True)
    assert generator.generate(net, given, other, silent).tokens != both


@pytest.mark.parametrize("setting", LOSSLESS)
@pytest.mark.parametrize("kind", ["16", "int8"])
def test_the_cache_is_that_of_the_text(setting: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever positions are taken back, what remains is what one pass over the text computes."""
    net, prompt = network("llama"), prompts(1, seed=7)[0]
    checked: list[int] = []
    text = [*prompt, *greedy_without_cache(net, prompt, 10, stop=False)] if kind == "16" else []
    rollback = Session.rollback

    def checking(self: Session, lengths: list[int]) -> None:
        rollback(self, lengths)
        for block, (keys, values) in enumerate(cache_of(net, text[: lengths[0]], kind)):
            own = self.cache.read(block, lengths[0])
            for one, other in zip(own, (keys, values), strict=True):
                assert one.shape == other.shape and float((one - other).abs().max()) <= 1e-10
        checked.append(lengths[0])

    if not text:
        text += [*prompt, *parse_generator("plain").generate(net, [prompt], Wanted(10, cache=kind), silent).tokens[0]]
    monkeypatch.setattr(Session, "rollback", checking)
    ready(setting).generate(net, [prompt], Wanted(10, cache=kind, ignore_stop=kind == "16"), silent)
    assert checked


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_does_not_fit_is_refused(setting: str) -> None:
    net = network("llama")
    with pytest.raises(InputError, match=r"161 positions.*made for 160"):
        ready(setting).generate(net, [[3] * 61], Wanted(100), silent)
