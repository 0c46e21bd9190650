"""The laws that every sparsifier obeys, run over the registry: a new file is tested without naming it here."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from tests.states import same, values
from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.prune.denoising import Unet
from layerwise.prune.sparsified import Examples, Sparsified
from layerwise.recipe import parse_sparsifier
from layerwise.roles import Sparsifier
from layerwise.technique import find, names
from layerwise.trials.sparsifiers import STUDIES, convolutions, drawn, perceptron, rivals_of

STEPS = 4
MODULES = {
    "convolutions": lambda: convolutions((4, 6, 6)),
    "perceptron": lambda: perceptron((12, 8)),
    "denoiser": lambda: Unet(width=8, timed=8),
}


def pictures(count: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 8, 8] of a bright row, whose place is the label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 8, (count,), generator=generator)
    pixels = 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    pixels[torch.arange(count), 0, labels] += 1.0
    return pixels, labels


@pytest.fixture(params=names(Sparsifier))
def sparsifier(request: pytest.FixtureRequest) -> Sparsifier:
    small = {"steps": STEPS, "taught": 2, "finish": 2, "students": 2, "candidates": 3, "devices": 3, "every": 2,
             "density": 0.3}  # fmt: skip
    made: Any = parse_sparsifier(request.param)
    return dataclasses.replace(made, **{k: v for k, v in small.items() if hasattr(made, k)})


@pytest.fixture(params=MODULES)
def examples(request: pytest.FixtureRequest, sparsifier: Sparsifier) -> Examples:
    made = Examples(drawn(0, MODULES[request.param]), *pictures(), seed=3)
    try:
        sparsifier.check(made)
    except InputError as refusal:
        assert len(str(refusal)) > 20
        pytest.skip(str(refusal))
    return made


def test_there_are_sparsifiers() -> None:
    assert {"fedtiny", "n2n", "maskunet", "ssvi"} <= set(names(Sparsifier))


def test_every_sparsifier_takes_some_module_and_names_a_study(sparsifier: Sparsifier) -> None:
    taken = 0
    for make in MODULES.values():
        try:
            sparsifier.check(Examples(drawn(0, make), *pictures()))
            taken += 1
        except InputError:
            pass
    assert taken and sparsifier.study in STUDIES and rivals_of(sparsifier)


def test_zero_steps_change_nothing(sparsifier: Sparsifier, examples: Examples) -> None:
    found = dataclasses.replace(sparsifier, steps=0).sparsify(examples)  # type: ignore[type-var]
    assert same(values(examples.module), values(found.module)) and not found.masks and not found.spreads
    assert not found.module.training


def test_the_given_module_and_the_global_generator_stay(sparsifier: Sparsifier, examples: Examples) -> None:
    before, generator, mode = values(examples.module), torch.get_rng_state(), examples.module.training
    steps: list[int] = []
    found = sparsifier.sparsify(dataclasses.replace(examples, stepped=lambda: steps.append(1)))
    assert same(before, values(examples.module)) and torch.equal(generator, torch.get_rng_state())
    assert examples.module.training == mode and len(steps) in (STEPS, 2 * STEPS)
    assert all(p.grad is None for p in examples.module.parameters())
    assert all(bool(torch.isfinite(v).all()) for v in values(found.module).values())
    assert found.figures and all(isinstance(v, float) for v in found.figures.values())


def test_what_a_mask_takes_out_is_zero_and_bytes_are_what_is_stored(sparsifier: Sparsifier, examples: Examples) -> None:
    found = sparsifier.sparsify(examples)
    for name, mask in found.masks.items():
        value = found.module.get_parameter(name)
        assert mask.shape == value.shape and 0 < int(mask.sum()) < mask.numel()
        assert not bool(value[~mask].any())
    for name, spread in found.spreads.items():
        assert bool((spread[found.masks[name]] > 0).all()) and not bool(spread[~found.masks[name]].any())
    rounded = found.rounded()
    assert rounded.nbytes == found.nbytes == Sparsified(rounded.module, found.masks, found.spreads).nbytes
    for name, form in found.stored().items():
        assert torch.equal(form.decode().view_as(found.masks[name]) != 0, rounded.module.get_parameter(name) != 0)
    if not found.spreads:
        assert all(torch.equal(v, v.half().to(v.dtype)) for v in rounded.module.parameters())


def test_a_seed_decides_everything(sparsifier: Sparsifier, examples: Examples) -> None:
    first, again = sparsifier.sparsify(examples), sparsifier.sparsify(copy.deepcopy(examples))
    assert same(values(first.module), values(again.module)) and first.figures == again.figures
    assert same(dict(first.masks), dict(again.masks)) and same(dict(first.spreads), dict(again.spreads))


@pytest.mark.parametrize("name", names(Sparsifier))
def test_a_module_that_it_cannot_take_is_refused_in_a_sentence(name: str) -> None:
    class Strange(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(InputError, match="Strange"):
        parse_sparsifier(name).sparsify(Examples(Strange(), *pictures()))
    if find(name).__name__ != "Maskunet":
        pixels, labels = pictures()
        module = drawn(0, MODULES["convolutions"])
        with pytest.raises(InputError, match="labels"):
            parse_sparsifier(name).sparsify(Examples(module, pixels))
        with pytest.raises(InputError, match="labels must be whole numbers"):
            parse_sparsifier(name).sparsify(Examples(module, pixels, labels[:-1]))
        with pytest.raises(InputError, match="labels reach 12"):
            parse_sparsifier(name).sparsify(Examples(module, pixels, labels + 5))
        with pytest.raises(InputError, match="two classes"):
            parse_sparsifier(name).sparsify(Examples(module, pixels, labels * 0))
