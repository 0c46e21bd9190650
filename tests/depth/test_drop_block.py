"""Block dropping: what is measured is what dropping does, and the measure chooses well."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.command import compress

import layerwise
from layerwise.acts.removal import measure_removals
from layerwise.depth.drop_block import DropBlock
from layerwise.errors import InputError
from layerwise.network.network import open_network
from layerwise.network.reblocked import reblocked
from layerwise.network.skeleton import materialised
from layerwise.recipe import canonical, surgery
from layerwise.roles import BlockMeasure

MEASURES = tuple(BlockMeasure(d, i) for d, i in ((0.4, 0.1), (0.1, 0.3), (0.2, 0.2)))


def test_the_least_harmful_blocks_go() -> None:
    assert DropBlock(count=1).order(MEASURES) == (0, 2)
    assert DropBlock(count=2).order(MEASURES) == (0,)
    assert DropBlock(count=1, measure="influence").order(MEASURES) == (1, 2)


def test_something_must_remain() -> None:
    with pytest.raises(InputError, match="leaves nothing of 3 blocks"):
        DropBlock(count=3).order(MEASURES)


def test_its_name_is_a_recipe_of_its_own() -> None:
    assert surgery("drop_block") == DropBlock() and surgery("rtn:bits=4") is None
    assert canonical("drop-block:count=2") == "drop_block:count=2"
    with pytest.raises(InputError, match="followed by exactly one encoder"):
        canonical("drop_block+rtn")


def logits(network: layerwise.network.network.Network, tokens: torch.Tensor) -> torch.Tensor:
    values = {name: network.read(name) for name, _ in network.module.named_parameters(remove_duplicate=False)}
    with materialised(network.module, values) as module, torch.no_grad():
        return module(tokens).logits.log_softmax(-1)  # type: ignore[no-any-return]


def test_the_measured_damage_is_the_loss_of_the_network_without_the_block(tiny_llama: Path, sentences: Path) -> None:
    network = open_network(str(tiny_llama))
    calibration = layerwise.calibrate(network, str(sentences), sequences=40, length=32)
    measures = measure_removals(calibration)
    assert len(measures) == len(network.tree.blocks)
    judged = calibration.splits.judge
    tokens = torch.cat([batch.tokens for batch in judged if batch.mask is None])
    assert len(tokens) == sum(len(batch.tokens) for batch in judged)
    dense = logits(network, tokens)
    for index, measure in enumerate(measures):
        order = [i for i in range(len(measures)) if i != index]
        without = logits(reblocked(network, order), tokens)
        expected = float((dense.exp() * (dense - without)).sum(-1).mean())
        assert measure.damage == pytest.approx(expected, rel=1e-3)


def test_texts_of_any_length_are_measured(tiny_bert: Path, sentences: Path) -> None:
    """An encoder's batches differ in length, and those of the judge split from those of the fit split."""
    calibration = layerwise.calibrate(open_network(str(tiny_bert)), str(sentences), sequences=60, length=24)
    measures = measure_removals(calibration)
    assert len(measures) == len(calibration.network.tree.blocks)
    assert all(m.damage > 0 and 0 < m.influence < 2 for m in measures)


def test_influence_is_one_minus_the_cosine(tiny_llama: Path, sentences: Path) -> None:
    network = open_network(str(tiny_llama))
    calibration = layerwise.calibrate(network, str(sentences), sequences=40, length=32)
    measures = measure_removals(calibration)
    offset, inputs = len(calibration.splits.fit), calibration.inputs()
    for index, measure in enumerate(measures):
        cosines = [
            torch.nn.functional.cosine_similarity(
                inputs[index].read(offset + k), inputs[index + 1].read(offset + k), dim=-1
            ).flatten()
            for k in range(len(calibration.splits.judge))
        ]
        assert measure.influence == pytest.approx(1 - float(torch.cat(cosines).mean()), abs=1e-5)


def test_a_plan_without_a_block(tiny_gpt2: Path, sentences: Path, tmp_path: Path) -> None:
    """The artifact has fewer blocks, is as large as predicted, and loads as the network of its config."""
    done = compress(
        tiny_gpt2, tmp_path / "out", sentences, "--budget", "60%", "--no-baseline",
        "--techniques", "rtn:bits=8,group=0,drop_block:count=1",
    )  # fmt: skip
    assert done.code == 0, done.err
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    gone = [block for block, label in plan["blocks"].items() if label == "drop_block:count=1"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    dense = json.loads((tiny_gpt2 / "config.json").read_text())
    assert len(gone) == 1 and config["n_layer"] == dense["n_layer"] - 1
    assert plan["predicted"]["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    module = layerwise.load(tmp_path / "out")
    assert len(module.transformer.h) == config["n_layer"]
    assert torch.isfinite(module(torch.tensor([[5, 6, 7]])).logits).all()


def test_a_kept_block_is_not_taken_out(tiny_llama: Path, sentences: Path) -> None:
    network = open_network(str(tiny_llama))
    calibration = layerwise.calibrate(network, str(sentences), sequences=40, length=32)
    found = layerwise.candidates(calibration, ("rtn:bits=8,group=0", "drop_block"))
    names = [choice.name for choice in found.tree().children if hasattr(choice, "options")]  # type: ignore[union-attr]
    assert names == list(network.tree.blocks)
    cheap = layerwise.plan(found, "5.5bpw")
    kept = layerwise.plan(found, "9bpw", keep=[r"layers\.0\."])
    assert "drop_block" in cheap.choices.values() and kept.choices[network.tree.blocks[0]] == "as is"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--techniques", "rtn,drop_block:count=9"), "leaves nothing of"),
        (("--techniques", "rtn,drop_block", "--sequential"), "leave out drop_block or --sequential"),
        (("--uniform", "drop_block"), "followed by exactly one encoder"),
    ],
)
def test_mistakes_are_named(
    tiny_llama: Path, sentences: Path, tmp_path: Path, options: tuple[str, ...], says: str
) -> None:
    budget = () if "--uniform" in options else ("--budget", "50%")
    done = compress(tiny_llama, tmp_path / "out", sentences, *budget, *options)
    assert done.code == 2 and says in done.err and not (tmp_path / "out").exists()
