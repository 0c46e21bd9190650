"""``--tune``: the same plan and size, with values that were tuned block by block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.command import compress

import layerwise
from layerwise.acts.kept import overlay
from layerwise.acts.tuning import tune
from layerwise.compress import Result
from layerwise.engine.progress import Stopwatch
from layerwise.evaluate.compare import compare
from layerwise.recipe import parse_tuner

SMALL: dict[str, Any] = {"sequences": 48, "length": 32, "threads": 1, "workers": 1, "baseline": False}
TUNER = "signround:steps=20"


def job(model: Path, out: Path, text: Path, **options: Any) -> Result:
    return layerwise.compress(model, out, calibrate=str(text), **(SMALL | options))


def weights(done: Result) -> bytes:
    return (done.out / "model.safetensors").read_bytes()


def errors(work: Path) -> list[list[float]]:
    """[before, after] of every tuned block in a work folder's journal."""
    entries = [json.loads(line) for line in (work / "journal.jsonl").read_text().splitlines()]
    return [entry["value"]["error"] for entry in entries if entry["unit"].startswith("tuned/")]


def test_a_uniform_setting_is_tuned_and_resumes(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    options: dict[str, Any] = {"uniform": "rtn:bits=2,group=32", "work": str(work)}
    plain = job(tiny_llama, tmp_path / "plain", sentences, **options)
    first = job(tiny_llama, tmp_path / "first", sentences, tune=TUNER, **options)
    assert len(weights(plain)) == len(weights(first)) == first.applied.bytes and weights(plain) != weights(first)
    found = errors(work)
    assert len(found) == 2 and all(after < 0.8 * before for before, after in found)
    assert first.evidence["checks"]["tuning"].startswith(TUNER)
    layerwise.load(first.out)

    lines = (work / "journal.jsonl").read_text().splitlines(keepends=True)
    kept = next(i for i, line in enumerate(lines) if '"tuned/' in line) + 1
    (work / "journal.jsonl").write_text("".join(lines[:kept]))
    resumed = job(tiny_llama, tmp_path / "resumed", sentences, tune=TUNER, **options)
    assert weights(resumed) == weights(first)

    other = job(tiny_llama, tmp_path / "other", sentences, tune="signround:steps=10", **options)
    assert weights(other) != weights(first)
    none = job(tiny_llama, tmp_path / "none", sentences, tune="signround:steps=0", **options)
    assert weights(none) == weights(plain)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_budget_with_rewritten_blocks(tiny_gpt2: Path, sentences: Path, tmp_path: Path, sequential: bool) -> None:
    options: dict[str, Any] = {
        "techniques": ("two_sided:bits=3,group=16", "awq+gptq:bits=4,group=16"),
        "budget": "6bpw",
        "sequential": sequential,
        "work": str(tmp_path / "work"),
    }
    plain = job(tiny_gpt2, tmp_path / "plain", sentences, **options)
    tuned = job(tiny_gpt2, tmp_path / "tuned", sentences, tune="signround:steps=40", **options)
    assert len(weights(plain)) == len(weights(tuned)) and weights(plain) != weights(tuned)
    assert (plain.out / "plan.json").read_text() == (tuned.out / "plan.json").read_text()
    assert all(after <= before for before, after in errors(tmp_path / "work"))


def test_a_uniform_rewrite_is_tuned_from_the_rewritten_weights(
    tiny_llama: Path, sentences: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"uniform": "awq+rtn:bits=3,group=32", "work": str(tmp_path / "work")}
    done = job(tiny_llama, tmp_path / "out", sentences, tune=TUNER, **options)
    assert list((tmp_path / "work").rglob("*.rewritten"))
    assert all(after < 0.9 * before for before, after in errors(tmp_path / "work"))
    assert done.applied.bytes == (done.out / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("tuner", "said"),
    [
        ("signruond", "signround"),
        ("gptq:bits=3", "is no tuner"),
        ("signround:steps=-1", "from 0 to 100000"),
        ("signround:step=5", "no option 'step'"),
    ],
)
def test_a_wrong_tuner_is_refused_at_once(
    tiny_llama: Path, sentences: Path, tmp_path: Path, tuner: str, said: str
) -> None:
    done = compress(tiny_llama, tmp_path / "out", sentences, "--uniform", "rtn:bits=4", "--tune", tuner)
    assert done.code == 2 and said in done.sentences[-1] and len(done.sentences) == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_a_whole_network_is_tuned_and_resumes(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    options: dict[str, Any] = {"uniform": "rtn:bits=2,group=32", "work": str(work), "tune": "lsq:steps=10,rate=0.03"}
    first = job(tiny_llama, tmp_path / "first", sentences, **options)
    ((before, after),) = errors(work)
    assert after < before and first.applied.bytes == len(weights(first))
    resumed = job(tiny_llama, tmp_path / "resumed", sentences, **options)
    assert weights(resumed) == weights(first) and len(errors(work)) == 1
    lines = [line for line in (work / "journal.jsonl").read_text().splitlines(keepends=True) if '"tuned/' not in line]
    (work / "journal.jsonl").write_text("".join(lines))
    again = job(tiny_llama, tmp_path / "again", sentences, **options)
    assert weights(again) == weights(first)
    layerwise.load(first.out)


@pytest.mark.parametrize("model", ["tiny_gpt2", "tiny_bert"])
def test_the_error_of_a_whole_network_is_its_loss(
    model: str, request: pytest.FixtureRequest, sentences: Path, tmp_path: Path
) -> None:
    """What a tuner of network scope is told at the start is what the evaluation measures on the same text."""
    network = layerwise.open(request.getfixturevalue(model))
    calibration = layerwise.calibrate(
        network, str(sentences), work=tmp_path / "work", sequences=48, length=32, threads=1
    )
    found = layerwise.candidates(calibration, techniques=("rtn:bits=3,group=16",))
    recipes = {name: site.candidates[0].recipe for name, site in found.sites.items()}
    batches = calibration.splits.all
    tune(calibration, found, recipes, parse_tuner("lsq:steps=0"), batches, Stopwatch(None))
    ((before, after),) = errors(tmp_path / "work")
    variants = {"stored": overlay(found, recipes)}
    done = compare(network, variants, calibration.loss, batches, calibration.folder)["stored"]
    assert before == after == pytest.approx(done.metrics[calibration.loss.name], rel=1e-4)


def test_a_whole_network_without_one_of_its_blocks(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "techniques": ("rtn:bits=3,group=16", "drop_block:count=1"),
        "budget": "6bpw",
        "work": str(tmp_path / "work"),
    }
    done = job(tiny_llama, tmp_path / "out", sentences, tune="lsq:steps=10,rate=0.03", **options)
    ((before, after),) = errors(tmp_path / "work")
    assert after < before and layerwise.load(done.out).config.num_hidden_layers == 1
