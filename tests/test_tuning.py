"""``--tune``: the same plan and size, with values that were tuned block by block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.command import compress

import layerwise
from layerwise.compress import Result

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
