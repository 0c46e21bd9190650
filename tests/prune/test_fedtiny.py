"""FedTiny: pooled statistics, masks of one size, refinements that keep counts, and what each of its steps is worth."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from tests.contract.test_sparsifiers import pictures
from torch import Tensor, nn

from layerwise.prune._devices import Devices, divided, load_statistics, norm_statistics, norms_of, pooled
from layerwise.prune.fedtiny import in_blocks, moving, refined, shared_out
from layerwise.prune.sparsified import Examples, hold
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


def trained() -> nn.Module:
    """A network of the server's, whose images are darker than the devices'."""
    (pixels, labels), module = pictures(200), drawn(2, lambda: convolutions((8, 12, 12)))
    adam = torch.optim.Adam(module.parameters(), 0.01)
    for _ in range(40):
        adam.zero_grad()
        nn.functional.cross_entropy(module(pixels), labels).backward()
        adam.step()
    return module.eval()


def brighter(count: int, seed: int) -> tuple[Tensor, Tensor]:
    pixels, labels = pictures(count, seed)
    return 1.5 * pixels + 0.5, labels


@torch.no_grad()
def loss_of(module: nn.Module, seen: tuple[Tensor, Tensor]) -> float:
    return float(nn.functional.cross_entropy(module(seen[0]), seen[1]))


def test_the_servers_stale_statistics_choose_a_worse_mask() -> None:
    """The ablation: on held-out images, once the norms are right, the mask that the devices chose is the better one."""
    module, seen, held = trained(), brighter(200, 1), brighter(400, 9)
    losses = {}
    for kind in ("devices", "server"):
        setting: Any = parse_sparsifier(f"fedtiny:density=0.1,candidates=24,devices=4,statistics={kind}")
        examples = Examples(module, *seen, seed=1)
        devices = Devices(*seen, divided(seen[1], 4, 0.5, 1), 1)
        found = setting.candidates_of(examples)
        reported = setting.losses_of(examples, devices, found)
        made = copy.deepcopy(module)
        hold(made, found[reported.index(min(reported))])
        devices.restated(made)
        losses[kind] = loss_of(made.eval(), held)
    assert losses["devices"] < losses["server"], losses


def test_at_equal_bytes_the_devices_choice_and_moves_beat_magnitude() -> None:
    module, seen, held = trained(), brighter(200, 1), brighter(400, 9)
    sizes, losses = set(), []
    for text in ("", ",candidates=1,share=0.0"):
        setting = parse_sparsifier(f"fedtiny:density=0.06,steps=10,local=3,devices=4,candidates=10{text}")
        found = setting.sparsify(Examples(module, *seen, seed=1))
        sizes.add(found.nbytes)
        losses.append(loss_of(found.module, held))
    assert len(sizes) == 1 and losses[0] < losses[1], losses
