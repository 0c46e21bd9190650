"""Techniques that need their own measurements, from end to end, however they are run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.vision import random_inputs, tiny_resnet

import layerwise
from layerwise.compress import Result
from layerwise.recipe import parse_recipe
from layerwise.technique import OF_THE_REVERSE_PASS

SMALL: dict[str, Any] = {"sequences": 64, "length": 32, "threads": 1, "baseline": False}
BOTH = ("rsq:bits=3,group=32", "gwq:bits=3,group=32,share=0.02")


def job(model: Path, out: Path, text: Path, **options: Any) -> Result:
    return layerwise.compress(model, out, calibrate=str(text), **({"workers": 1} | SMALL | options))


def weights(done: Result) -> bytes:
    return (done.out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_mixtral"])
def test_texts_with_padding_and_experts_have_them(
    name: str, sentences: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model: Path = request.getfixturevalue(name)
    layerwise.load(job(model, tmp_path / "out", sentences, techniques=BOTH, budget="8bpw").out)


def test_a_uniform_setting_measures_them_with_any_number_of_workers(
    tiny_llama: Path, sentences: Path, tmp_path: Path
) -> None:
    for recipe, plain in zip(BOTH, ("gptq:bits=3,group=32", "rtn:bits=3,group=32"), strict=True):
        assert OF_THE_REVERSE_PASS & parse_recipe(recipe).needs and not OF_THE_REVERSE_PASS & parse_recipe(plain).needs
    mine = job(tiny_llama, tmp_path / "mine", sentences, uniform=BOTH[0])
    again = job(tiny_llama, tmp_path / "again", sentences, uniform=BOTH[0], workers=2)
    other = job(tiny_llama, tmp_path / "other", sentences, uniform="rsq:bits=3,group=32,least=1")
    assert weights(mine) == weights(again) != weights(other)


def test_behind_a_stored_prefix_and_after_a_rewrite(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    mixed = (BOTH[0], f"awq+{BOTH[1]}")
    layerwise.load(job(tiny_llama, tmp_path / "out", sentences, techniques=mixed, budget="6bpw", sequential=True).out)


def test_a_network_without_blocks_has_gradients_and_no_importance(tmp_path: Path) -> None:
    network = layerwise.open(tiny_resnet(), random_inputs(160, 3, 8, 8))
    recipes = ("rsq:bits=3,group=32", "gptq:bits=3,group=32", "gwq:bits=3,group=32,share=0.05")
    calibration = layerwise.calibrate(network, work=tmp_path / "work", threads=1)
    found = layerwise.candidates(calibration, recipes)
    calibration.journal.close()
    for site in found.sites.values():
        damages = {c.recipe.partition(":")[0]: c.damage for c in site.candidates}
        assert damages.get("rsq", damages.get("gptq")) == damages.get("gptq", damages.get("rsq"))
