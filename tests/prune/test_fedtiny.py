"""FedTiny: pooled statistics, masks of one size, refinements that keep counts, and what each of its steps is worth."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from tests.contract.test_sparsifiers import pictures
from torch import nn

from layerwise.prune._devices import Devices, divided, load_statistics, norm_statistics, norms_of, pooled
from layerwise.prune.fedtiny import in_blocks, moving, refined, shared_out
from layerwise.prune.sparsified import Examples, Sparsified, hold
from layerwise.recipe import parse_sparsifier
from layerwise.trials.sparsifiers import convolutions, drawn


def test_pooled_statistics_are_those_of_all_images_together() -> None:
    module, (pixels, labels) = drawn(1, lambda: convolutions((4, 5, 6))), pictures(90)
    parts = divided(labels, 4, 0.3, 0)
    weights = [len(part) / 90 for part in parts]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(90)) and min(map(len, parts)) >= 2
    found = pooled([norm_statistics(module, pixels[part]) for part in parts], weights)
    whole = norm_statistics(module, pixels)
    first = next(iter(norms_of(module)))  # no norm lies before it
    torch.testing.assert_close(found[first], whole[first])
    alone = pooled([whole], [1.0])
    assert all(torch.equal(a, b) for name in whole for a, b in zip(alone[name], whole[name], strict=True))
    load_statistics(module, found)
    assert torch.equal(norms_of(module)[first].running_mean, found[first][0])  # type: ignore[arg-type]


def test_small_skew_gives_devices_few_classes() -> None:
    labels = pictures(400)[1]

    def classes(skew: float) -> float:
        parts = divided(labels, 5, skew, 0)
        return sum(float(labels[p].bincount(minlength=8).max()) / len(p) for p in parts) / 5

    assert classes(0.1) > classes(100.0) + 0.1


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 1.0])
def test_all_candidates_keep_as_many_weights(density: float) -> None:
    sizes = torch.tensor([36, 900, 17, 4000])
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        weights = 1 + 0.9 * (2 * torch.rand(4, generator=generator, dtype=torch.float64) - 1)
        counts = shared_out(weights, sizes, density)
        assert sum(counts) == max(4, int(density * 4953 + 0.5))
        assert all(1 <= c <= s for c, s in zip(counts, sizes.tolist(), strict=True))


def test_a_refinement_keeps_counts_and_what_grows_is_zero() -> None:
    fedtiny: Any = dataclasses.replace(parse_sparsifier("fedtiny:candidates=1,devices=3,density=0.2,ends=true"))  # type: ignore[type-var]
    module, (pixels, labels) = drawn(1, lambda: convolutions((4, 5, 6))), pictures(90)
    masks = fedtiny.candidates_of(Examples(module, pixels, labels))[0]
    hold(module, masks)
    devices = Devices(pixels, labels, divided(labels, 3, 0.5, 0), 0)
    counts = moving(masks, list(masks), 0.6, 0.0)
    changed = refined(module, masks, devices, counts, 32)
    before = {name: module.get_parameter(name).detach().clone() for name in masks}
    hold(module, changed)
    assert any(not torch.equal(masks[name], changed[name]) for name in masks)
    for name, mask in changed.items():
        assert int(mask.sum()) == int(masks[name].sum())
        grown, gone = mask & ~masks[name], masks[name] & ~mask
        value = module.get_parameter(name).detach()
        assert not bool(value[grown].any()) and torch.equal(value[mask & masks[name]], before[name][mask & masks[name]])
        if bool(gone.any()):  # the smallest of those that were there
            assert before[name][gone].abs().max() <= before[name][mask & masks[name]].abs().min()
    grown_only = copy.deepcopy(module)
    for name in masks:
        with torch.no_grad():
            grown_only.get_parameter(name).copy_(torch.where(masks[name] | changed[name], before[name], 0.0))
    whole = copy.deepcopy(module)
    with torch.no_grad():
        for name in masks:
            whole.get_parameter(name).copy_(before[name])
    assert torch.equal(grown_only.eval()(pixels), whole.eval()(pixels))  # growth changes no function


def test_blocks_go_from_the_output_and_moves_end() -> None:
    assert in_blocks(["a", "b", "c", "d", "e"], 2) == [["c", "d", "e"], ["a", "b"]]
    mask = {"a": torch.arange(100) < 40}
    assert moving(mask, ["a"], 0.3, 0.0) == {"a": 12} and moving(mask, ["a"], 0.3, 1.0) == {"a": 0}


def test_the_bytes_of_all_settings_are_equal_and_the_devices_choice_and_moves_help() -> None:
    """The ablation: on shifted devices' data the server's stale norms choose worse, a mask that stays trains worse."""
    pixels, labels = pictures(400)
    module = drawn(2, lambda: convolutions((8, 12, 12)))
    adam = torch.optim.Adam(module.parameters(), 0.01)
    for _ in range(60):
        adam.zero_grad()
        nn.functional.cross_entropy(module(pixels[:200]), labels[:200]).backward()
        adam.step()
    seen = 1.5 * pixels[200:] + 0.5  # the devices' images are brighter than the server's
    held, sizes, losses = pictures(300, seed=9), set(), {}
    for text in ("", "statistics=server", "candidates=1,share=0.0"):
        asked = ",".join(filter(None, ["density=0.06,steps=10,local=3,devices=4,candidates=10", text]))
        found = parse_sparsifier(f"fedtiny:{asked}").sparsify(Examples(module.eval(), seen, labels[200:], 1))
        sizes.add(found.nbytes)
        with torch.no_grad():
            losses[text] = float(nn.functional.cross_entropy(found.module(1.5 * held[0] + 0.5), held[1]))
        assert isinstance(found, Sparsified)
    assert len(sizes) == 1
    assert losses[""] < losses["statistics=server"] and losses[""] < losses["candidates=1,share=0.0"], losses
