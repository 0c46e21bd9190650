"""What sites with the same inputs share: made once, the same bytes, let go of, and never another tensor's."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import layerwise
from layerwise.calibrate import statistics as module
from layerwise.calibrate.moments import Moment
from layerwise.calibrate.shared import SharedInputs
from layerwise.calibrate.statistics import Shared, SiteStatistics, Use
from layerwise.network.folds import scaled
from layerwise.quantize import _rounding
from layerwise.recipe import parse_technique

ONE_SIDED = ("gptq:bits=3,group=16", "rsq:bits=3,group=16,least=1", "aptq:bits=3,group=16")


def moment(size: int = 48, seed: int = 0) -> Tensor:
    vectors = torch.randn(6 * size, size, generator=torch.Generator().manual_seed(seed))
    vectors[:, 1:] += vectors[:, :-1]
    return vectors.T @ vectors / len(vectors)


def site(inputs: Tensor, rows: int = 8) -> SiteStatistics:
    return SiteStatistics((Use(torch.ones(rows), inputs, inputs, inputs.diagonal().sqrt(), 1.0, 1000),))


def weight(seed: int, rows: int = 8, columns: int = 48) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def factored(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that ``factor`` was called on."""
    calls: list[Tensor] = []
    original = _rounding.factor

    def counted(side: Tensor, *given: Any, **options: Any) -> Any:
        calls.append(side)
        return original(side, *given, **options)

    monkeypatch.setattr(_rounding, "factor", counted)
    return calls


def job(model: Path, out: Path, text: Path, **options: Any) -> bytes:
    small: dict[str, Any] = {"sequences": 64, "length": 32, "threads": 1, "workers": 1, "baseline": False}
    return (
        layerwise.compress(model, out, calibrate=str(text), **(small | options)).out / "model.safetensors"
    ).read_bytes()


@contextmanager
def apart(_: SharedInputs, statistics: SiteStatistics) -> Iterator[SiteStatistics]:
    yield statistics


def test_a_block_is_factored_once_a_group_into_the_same_bytes(
    tiny_llama: Path, sentences: Path, tmp_path: Path, factored: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """q, k and v; o; gate and up; down: four factors a block, for any number of workers."""
    blocks = len(layerwise.open(tiny_llama).tree.blocks)
    uniform = "gptq:bits=4,group=32"
    one = job(tiny_llama, tmp_path / "one", sentences, uniform=uniform)
    assert len(factored) == 4 * blocks
    three = job(tiny_llama, tmp_path / "three", sentences, uniform=uniform, workers=3)
    assert len(factored) == 8 * blocks and three == one
    few = {"sequences": 80, "length": 16}  # fewer tokens than inputs: what they are shrunk to is shared too
    scarce = job(tiny_llama, tmp_path / "scarce", sentences, uniform=uniform, **few)
    assert len(factored) == 12 * blocks
    monkeypatch.setattr(SharedInputs, "of", apart)
    factored.clear()
    assert job(tiny_llama, tmp_path / "apart", sentences, uniform=uniform) == one
    assert len(factored) == 7 * blocks
    assert job(tiny_llama, tmp_path / "scarce_apart", sentences, uniform=uniform, **few) == scarce


@pytest.mark.parametrize(
    "options",
    [
        {"uniform": "awq+gptq:bits=4,group=32"},
        {"techniques": ("trellis:bits=2", "awq+gptq:bits=3,group=32", "sparsegpt:bits=4"), "budget": "5bpw"},
        {"techniques": ("two_sided:bits=3,group=32", "rsq:bits=3,group=32", "aptq:bits=4,group=32"), "budget": "5bpw"},
    ],
    ids=["scaled", "trellis", "two_sided"],
)
def test_bytes_are_those_without_sharing(
    options: dict[str, Any], tiny_llama: Path, sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_it = job(tiny_llama, tmp_path / "with", sentences, workers=2, **options)
    monkeypatch.setattr(SharedInputs, "of", apart)
    assert job(tiny_llama, tmp_path / "without", sentences, **options) == with_it


@pytest.mark.parametrize("recipe", ONE_SIDED)
def test_a_rewritten_site_has_a_factor_of_its_own(recipe: str, factored: list[Tensor]) -> None:
    """Scaled columns and equal tensors are not the group's, even where its place is carried along."""
    common, encoder = moment(), parse_technique(recipe)
    plain = [site(common), site(common)]
    rewritten = scaled(plain[0], columns=torch.linspace(0.2, 5, 48))
    equal = site(common.clone())
    alone = [encoder.encode(weight(i), s) for i, s in enumerate((*plain, rewritten, equal))]
    factored.clear()
    together = SharedInputs([*plain, rewritten, equal])
    for i, statistics in enumerate((*plain, rewritten, equal)):
        with together.of(statistics) as known:
            assert (known.shared is None) == (i > 1)
            assert torch.equal(encoder.encode(weight(i), known).codes(), alone[i].codes())
    assert [id(s) for s in factored] == [id(s.inputs) for s in (plain[0], rewritten, equal)]

    carried = replace(rewritten, shared=Shared(common))
    encoder.encode(weight(0), replace(plain[0], shared=carried.shared))
    assert torch.equal(encoder.encode(weight(2), carried).codes(), alone[2].codes())


def test_options_that_change_the_factor_have_one_each(factored: list[Tensor]) -> None:
    known = site(inputs := moment())
    known = replace(known, shared=Shared(inputs))
    recipes = ["gptq:bits=4,group=16", "gptq:bits=2,group=48,symmetric=true", "gptq:bits=4,group=16,damp=0.1"]
    recipes += ["gptq:bits=4,group=16,act_order=false", "two_sided:bits=4,group=16,row_damp=1"]
    for recipe in recipes:
        encoder = parse_technique(recipe)
        codes = encoder.encode(weight(0), known).codes()
        assert torch.equal(codes, encoder.encode(weight(0), site(moment())).codes())
    assert len([s for s in factored if s is inputs]) == 4  # two of GPTQ's have the same


def test_the_last_of_a_group_lets_go() -> None:
    statistics = [site(moment()), site(moment(seed=1))]
    statistics.insert(1, site(statistics[0].inputs))
    groups, kept = SharedInputs(statistics), []

    class Value:
        pass

    def take(each: SiteStatistics) -> None:
        with groups.of(each) as known:
            if known.shared is not None:
                kept.append(weakref.ref(known.remembered("value", 48, Value, source=known.inputs)))

    gc.disable()
    try:
        take(statistics[0])
        assert len(groups) == 1 and kept[0]() is not None
        take(statistics[2])  # alone with its inputs: nothing is kept for it
        assert len(groups) == 1 and len(kept) == 1
        take(statistics[1])
        assert len(groups) == 0 and kept[0]() is None and len(kept) == 2
    finally:
        gc.enable()


def test_an_encoding_that_fails_counts_as_done() -> None:
    statistics = [site(moment())] * 2
    groups = SharedInputs(statistics)
    for each in statistics:
        with pytest.raises(ValueError), groups.of(each):
            raise ValueError
    assert len(groups) == 0


def test_who_asks_for_what_is_being_made_waits() -> None:
    place, begun, made = Shared(moment()), threading.Event(), []

    def make() -> str:
        begun.set()
        made.append(threading.Event().wait(0.05))
        return "made"

    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(place.remembered, "key", make) for _ in range(4)]
        assert begun.wait(5) and [f.result() for f in found] == ["made"] * 4
    assert len(made) == 1


def test_of_a_wide_side_one_value_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_REMEMBERED", 47)
    place, made = Shared(moment()), []
    for key in ("a", "a", "b", "a"):
        place.remembered(key, lambda key=key: made.append(key))  # type: ignore[misc]
    assert made == ["a", "b", "a"]


def test_one_tensor_is_known_of_a_moment() -> None:
    gathered = Moment(8)
    gathered.add(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))
    known = gathered.known()
    assert known is gathered.known() and not torch.equal(known, gathered.mean())
    gathered = Moment(8)
    gathered.add(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))
    assert gathered.known() is gathered.known() is gathered.mean()
