"""The laws that every registered tuner obeys, on every kind of network; one block has 2 bits and one 3."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import layerwise
from layerwise.acts.kept import Candidates
from layerwise.acts.tuning import tune
from layerwise.calibrate.passes import Calibration
from layerwise.encoding.dense import Dense
from layerwise.engine.progress import Stopwatch
from layerwise.recipe import parse_tuner
from layerwise.roles import Tuner
from layerwise.technique import find, names

NETWORKS = ("tiny_llama", "tiny_gpt2", "tiny_bert")
RECIPES = ("rtn:bits=3,group=32", "rtn:bits=2,group=32")  # of two blocks in turn
STEPS = 12
GIVES_UP_LEVELS = {"ternary_binary"}  # so a few steps do not yet beat what was given; they must not harm it


@dataclasses.dataclass(frozen=True)
class Planned:
    """A network with a plan: one linear of a block at 16 bits, all else on integer grids."""

    calibration: Calibration
    candidates: Candidates
    recipes: dict[str, str]
    left_alone: str

    def tuned(self, tuner: Tuner) -> Candidates:
        return tune(
            self.calibration, self.candidates, self.recipes, tuner, self.calibration.splits.all, Stopwatch(None)
        )

    def tensors(self, found: Candidates) -> dict[str, dict[str, Tensor]]:
        return {name: found.sites[name].fetch(recipe).tensors() for name, recipe in self.recipes.items()}

    def errors(self) -> list[list[float]]:
        """Of every block that any tuner has tuned: [before, after]."""
        return [v["error"] for unit, v in self.calibration.journal.entries.items() if unit.startswith("tuned/")]

    def forget(self, count: int) -> None:
        """Drop the latest tuned blocks, as a kill before they were finished would."""
        units = [u for u in self.calibration.journal.entries if u.startswith("tuned/")]
        for unit in units[len(units) - count :]:
            self.calibration.journal.forget(unit)


@pytest.fixture(scope="module", params=NETWORKS)
def planned(request: pytest.FixtureRequest, sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Planned:
    model: Path = request.getfixturevalue(request.param)
    network = layerwise.open(model)
    calibration = layerwise.calibrate(
        network, str(sentences), work=tmp_path_factory.mktemp("tuned") / "work", sequences=48, length=32, threads=1
    )
    found = layerwise.candidates(calibration, techniques=RECIPES)
    blocks = network.tree.blocks
    recipes = {}
    for name, site in found.sites.items():
        bits = "bits=2" if site.site.block == blocks[0] else "bits=3"
        offered = [c.recipe for c in site.candidates if c.recipe.startswith("rtn") and bits in c.recipe]
        recipes[name] = (offered or [c.recipe for c in site.candidates])[0]
    left_alone = next(s.name for s in network.tree.sites if s.block == blocks[1])
    recipes[left_alone] = next(c.recipe for c in found.sites[left_alone].candidates if c.recipe.startswith("dense"))
    return Planned(calibration, found, recipes, left_alone)


@pytest.fixture(params=[*names(Tuner), "signround:scope=network"])
def tuner(request: pytest.FixtureRequest) -> Tuner:
    return in_steps(parse_tuner(request.param), STEPS)


def in_steps(tuner: Tuner, steps: int) -> Tuner:
    return dataclasses.replace(tuner, steps=steps)  # type: ignore[type-var]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_there_are_tuners() -> None:
    assert {"signround", "flexround", "lsq"} <= set(names(Tuner))
    assert {find(name)().scope for name in names(Tuner)} == {"block", "network"}  # type: ignore[attr-defined]


def test_zero_steps_change_nothing(planned: Planned, tuner: Tuner) -> None:
    before = planned.tensors(planned.candidates)
    after = planned.tensors(planned.tuned(in_steps(tuner, 0)))
    assert all(same(before[name], after[name]) for name in before)


def test_the_error_falls_in_the_same_layout(planned: Planned, tuner: Tuner) -> None:
    before, found = planned.tensors(planned.candidates), planned.tuned(tuner)
    after = planned.tensors(found)
    changed = {name for name in before if not same(before[name], after[name])}
    blocks = planned.calibration.network.tree.blocks
    assert (changed or tuner.name in GIVES_UP_LEVELS) and all(
        planned.calibration.network.tree.find(name).block in blocks for name in changed
    )
    for name in before:
        shapes = [{k: (t.dtype, t.shape) for k, t in tensors[name].items()} for tensors in (before, after)]
        assert shapes[0] == shapes[1]
        specs = [c.sites[name].fetch(planned.recipes[name]).spec() for c in (planned.candidates, found)]
        assert specs[0] == specs[1]
        assert torch.isfinite(found.sites[name].fetch(planned.recipes[name]).decode()).all()
    errors = planned.errors()
    assert all(after <= before for before, after in errors) and any(after < before for before, after in errors)


def test_what_it_does_not_declare_is_left_alone(planned: Planned, tuner: Tuner) -> None:
    network = planned.calibration.network
    before, after = planned.tensors(planned.candidates), planned.tensors(planned.tuned(tuner))
    for name, recipe in planned.recipes.items():
        form = planned.candidates.sites[name].fetch(recipe)
        if network.tree.find(name).block is None or not tuner.touches(form):
            assert same(before[name], after[name])
    left = planned.candidates.sites[planned.left_alone].fetch(planned.recipes[planned.left_alone])
    assert isinstance(left, Dense) and not tuner.touches(left)


def test_it_is_pure_and_goes_on_after_a_kill(planned: Planned, tuner: Tuner) -> None:
    random_state, first = torch.get_rng_state(), planned.tensors(planned.tuned(tuner))
    assert torch.equal(torch.get_rng_state(), random_state)
    for count in (1, 2):
        planned.forget(count)
        again = planned.tensors(planned.tuned(tuner))
        assert all(same(first[name], again[name]) for name in first)
    json.dumps(planned.calibration.journal.entries)
