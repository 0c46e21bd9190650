"""``layerwise tune``: from a smaller network to the same one with better values, resumed, refused, and measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.command import layerwise

from layerwise.distill import _training
from layerwise.distill.inherit import inherit
from layerwise.distill.text import TextLesson
from layerwise.jobs import distilling
from layerwise.jobs.bench import Bench, bench
from layerwise.jobs.distilling import distil
from layerwise.jobs.distilling_prepare import Distillation, forecast_distillation, prepare_distillation
from layerwise.network.load import load
from layerwise.network.network import open_network
from layerwise.roles import Distiller
from layerwise.technique import names
from layerwise.trials import distillers
from layerwise.trials.distillers import Study, distiller_trials

SMALL = ("--sequences", "48", "--length", "16", "--threads", "1")


def smaller(teacher: Path, folder: Path, blocks: tuple[int, ...] = (1,)) -> Path:
    """The checkpoint without some of its blocks."""
    shutil.copytree(teacher, folder)
    (folder / "model.safetensors").unlink()
    inherit(load(teacher, dtype=torch.float32), blocks).save_pretrained(folder)
    return folder


@pytest.fixture
def student(tiny_llama: Path, tmp_path: Path) -> Path:
    return smaller(tiny_llama, tmp_path / "student")


def run(student: Path, out: Path, teacher: Path, text: Path, *options: str | Path) -> Any:
    return layerwise("tune", student, out, "--teacher", teacher, "--calibrate", text, *SMALL, *options)


def test_a_student_comes_nearer_and_loads_as_itself(
    student: Path, tiny_llama: Path, sentences: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = run(student, out, tiny_llama, sentences, "--technique", "hidden:steps=12,sequences=16,rate=0.01")
    assert done.code == 0, done.err
    assert "perplexity" in done.out and "baseline" in done.out and str(out) in done.out
    evidence = json.loads((out / "evidence.json").read_text())
    rows = {row["name"]: row for row in evidence["rows"]}
    assert list(rows) == ["teacher", "student", "tuned", "baseline"] and rows["teacher"]["quality"]["kl"] == 0
    assert rows["baseline"]["technique"].startswith("logits:steps=12,sequences=16")
    assert rows["tuned"]["quality"]["kl"] < rows["student"]["quality"]["kl"]
    assert evidence["judged"]["tuned"][1] < evidence["judged"]["tuned"][0] and len(evidence["losses"]) == 12
    before, after = open_network(student), open_network(out)
    assert before.checkpoint.tensors.keys() == after.checkpoint.tensors.keys()
    assert evidence["bytes"] == after.checkpoint.safetensors_bytes
    assert not (tmp_path / "out.work").exists()
    found = layerwise("inspect", out, "--json")
    assert found.code == 0 and found.json["parameters"] == before.tree.parameters


@pytest.mark.parametrize("network", ["tiny_bert", "tiny_bert_classifier"])
def test_encoders_and_classifiers_learn_too(
    network: str, sentences: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    teacher: Path = request.getfixturevalue(network)
    student = smaller(teacher, tmp_path / "student")
    name = "tinyclip" if network == "tiny_bert" else "ted"
    done = run(
        student, tmp_path / "out", teacher, sentences, "--no-baseline", "--technique", f"{name}:steps=4", "--json"
    )
    assert done.code == 0, done.err
    assert [row["name"] for row in done.json["rows"]] == ["teacher", "student", "tuned"]


def test_zero_steps_write_the_student(student: Path, tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    done = run(student, tmp_path / "out", tiny_llama, sentences, "--technique", "ted:steps=0")
    assert done.code == 0, done.err
    for name, info in open_network(student).checkpoint.tensors.items():
        assert torch.equal(
            open_network(student).checkpoint.read(name), open_network(tmp_path / "out").checkpoint.read(name)
        )
        assert info.dtype == open_network(tmp_path / "out").checkpoint.tensors[name].dtype


def test_a_killed_run_goes_on_to_the_same_bytes(
    student: Path, tiny_llama: Path, sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--technique", "ted:steps=10,sequences=8", "--no-baseline")
    assert run(student, tmp_path / "whole", tiny_llama, sentences, *asked).code == 0
    parts = _training.parts_drawn

    def few(count: int, steps: int, seed: int) -> list[int]:
        return parts(count, steps, seed)[:7]  # the eighth step finds nothing, as after a kill

    with monkeypatch.context() as patched:
        patched.setattr(_training, "parts_drawn", few)
        with pytest.raises(IndexError):
            run(student, tmp_path / "resumed", tiny_llama, sentences, *asked)
    kept = tmp_path / "resumed.work" / "tuned.safetensors"
    assert kept.is_file() and not (tmp_path / "resumed").exists()
    steps: list[int] = []
    original = distilling.lesson_of

    def counted(*given: Any) -> TextLesson:
        lesson = original(*given)
        lesson.distance = lambda part: (steps.append(part), TextLesson.distance(lesson, part))[1]  # type: ignore[method-assign]
        return lesson

    monkeypatch.setattr(distilling, "lesson_of", counted)
    done = run(student, tmp_path / "resumed", tiny_llama, sentences, *asked)
    assert done.code == 0, done.err
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert weights[0] == weights[1] and not kept.exists()
    other = ("--technique", "ted:steps=11,sequences=8", "--no-baseline", "--work", tmp_path / "resumed.work")
    assert run(student, tmp_path / "third", tiny_llama, sentences, *other).code == 0  # the folder is gone: a new run


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--technique", "gptq"], "the distiller 'gptq' distils nothing; the distillers are"),
        (["--technique", "tedd"], "the distiller 'tedd' does not exist"),
        (["--technique", "ted:rank=0"], "option 'rank' of ted must be from 0.01 to 1"),
        (["--technique", "tinyclip"], "this network predicts; take a bare encoder"),
        (["--technique", "pvd:first=0.8,second=0.8"], "first + second <= 1"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--evaluate", "TEXT"], "are in the calibration text too"),
        (["--pooling", "cls"], "--pooling is for bare encoders"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    options: list[str], sentence: str, student: Path, tiny_llama: Path, sentences: Path, tmp_path: Path
) -> None:
    given = [str(sentences) if o == "TEXT" else o for o in options]
    done = run(student, tmp_path / "out", tiny_llama, sentences, *given)
    assert done.code == 2 and sentence in " ".join(done.err.split()), done.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_networks_that_do_not_belong_together_are_refused(
    student: Path, tiny_llama: Path, tiny_bert: Path, sentences: Path, tmp_path: Path
) -> None:
    done = run(student, tmp_path / "out", tiny_bert, sentences)
    assert done.code == 2 and "cannot learn from a BertModel" in done.err
    packed = tmp_path / "packed"
    made = layerwise(
        "compress", tiny_llama, packed, "--uniform", "rtn:bits=4,group=32", "--no-baseline", "--calibrate", sentences,
        "--sequences", "80", "--length", "16", "--threads", "1", "--workers", "1",
    )  # fmt: skip
    assert made.code == 0, made.err
    done = run(packed, tmp_path / "out", tiny_llama, sentences)
    assert done.code == 2 and "use compress --tune for stored forms" in done.err


def test_a_dry_run_says_how_long(student: Path, tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    done = run(student, tmp_path / "out", tiny_llama, sentences, "--dry-run")
    assert done.code == 0 and "time" in done.out and not (tmp_path / "out").exists()
    asked = Distillation(str(student), str(tmp_path / "o"), str(tiny_llama), "ted:steps=100", str(sentences), threads=1)
    once = forecast_distillation(prepare_distillation(asked))
    more = Distillation(str(student), str(tmp_path / "o"), str(tiny_llama), "ted:steps=9000", str(sentences), threads=1)
    assert forecast_distillation(prepare_distillation(more)).seconds > once.seconds and once.memory > 0


def test_the_library_gives_what_the_verb_prints(
    student: Path, tiny_llama: Path, sentences: Path, tmp_path: Path
) -> None:
    asked = Distillation(
        str(student), str(tmp_path / "out"), str(tiny_llama), "logits:steps=2", str(sentences),
        sequences=48, length=16, threads=1,
    )  # fmt: skip
    found = distil(asked)
    assert [row["name"] for row in found["rows"]] == ["teacher", "student", "tuned"]  # logits is its own baseline


@pytest.mark.parametrize("name", names(Distiller))
def test_bench_measures_every_distiller(
    name: str, tiny_llama: Path, sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = sentences.read_text().splitlines()
    (tmp_path / "train.txt").write_text("\n".join(lines[:300]))
    (tmp_path / "held.txt").write_text("\n".join(lines[300:]))
    study = Study(2, 4, 16, 0.5, 1.0, (1,), 4, 4, (32, 2, 2), (2, 2, 6))
    monkeypatch.setattr(distillers, "POOL", 8)
    monkeypatch.setattr(
        "layerwise.jobs.bench.ROLES", {"distiller": lambda ground, asked: distiller_trials(ground, asked, study)}
    )
    asked = Bench(
        name, str(tiny_llama), str(tmp_path / "train.txt"), str(tmp_path / "held.txt"), (0,), 80, 16, workers=1
    )
    found = bench(asked)
    assert found.rows and all(row.bytes == row.baseline.bytes and row.value >= 0 for row in found.rows)
    assert all(f"{name}" in row.setting and "steps=2" in row.setting for row in found.rows)
