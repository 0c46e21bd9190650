"""The act *distil* (``layerwise tune``): train a smaller dense network on what a larger one gives, and prove it.

    STUDENT, TEACHER ─→ in memory ─┐
    text ─→ train · judge ─────────┴─→ distiller ─→ the judged best state, in the student's own types ─→ OUT
    held-out text ─→ teacher, student before, after, and after as many steps of ``logits`` ─→ evidence.json

Both networks are in memory whole. Everything a run is made of waits in the work folder, so that a killed run goes on to
the same bytes.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.calibrate.splits import tokens_in
from layerwise.distill.lesson import Distilled
from layerwise.distill.text import TextLesson
from layerwise.engine.journal import Journal, identity_of
from layerwise.engine.machine import peak_memory, versions
from layerwise.engine.progress import Progress, Stopwatch
from layerwise.errors import InputError
from layerwise.jobs.distilling_prepare import Distillation, Ready, forecast_distillation, prepare_distillation
from layerwise.network import safetensors_file
from layerwise.network.artifact import METADATA, staged, write_config
from layerwise.network.checkpoint import WEIGHTS
from layerwise.network.companions import copy_companions
from layerwise.network.load import load
from layerwise.network.network import Network
from layerwise.network.skeleton import StoredNames
from layerwise.report.figures import duration, significant
from layerwise.roles import Distiller

FORMAT, VERSION = "layerwise-distillation", 1
AT_ONCE = 8  # sequences, when measuring
SAVED_EVERY = 20.0  # seconds


def distil(asked: Distillation, progress: Progress | None = None, command: str = "") -> dict[str, Any]:
    """Train and write ``asked.out``; returns its evidence.

    Raises ``InputError`` before any training for whatever the user got wrong. A run that is interrupted leaves its work
    folder, and the same call continues it.
    """
    watch = Stopwatch(progress)
    with watch.stage("open and check", 1) as advance:
        ready = prepare_distillation(asked)
        for network in (ready.student, ready.teacher):
            network.checkpoint.check_finite()
        torch.set_num_threads(asked.threads)
        teacher = load(ready.teacher.checkpoint.directory, dtype=torch.float32)
        student = load(ready.student.checkpoint.directory, dtype=torch.float32)
        for setting in runs_of(ready):
            setting.check(lesson_of(ready, student, teacher, setting))
        advance()
    watch.note(f"{ready.distiller} takes about {duration(forecast_distillation(ready).seconds)}")
    folder = Path(asked.work) if asked.work else Path(asked.out).with_name(Path(asked.out).name + ".work")
    journal = Journal(folder, identity_of(identity(ready)))
    try:
        evidence = run(ready, student, teacher, folder, watch, command)
    except BaseException:
        journal.close()
        raise
    journal.close(remove=asked.work is None)
    return evidence


def run(
    ready: Ready, student: nn.Module, teacher: nn.Module, folder: Path, watch: Stopwatch, command: str
) -> dict[str, Any]:
    asked, given = ready.asked, {n: p.detach().clone() for n, p in student.named_parameters()}
    rows = [{"name": "student", "technique": None, "quality": measure(ready, student, teacher)}]
    found: dict[str, Distilled] = {}
    kept: dict[str, Tensor] = {}
    for name, setting in zip(("tuned", "baseline"), runs_of(ready), strict=False):
        put(student, given)
        lesson = lesson_of(ready, student, teacher, setting, Saved(folder / f"{name}.safetensors"))
        with watch.stage(f"tune by {setting}", max(1, setting.steps)) as advance:
            lesson.stepped = advance
            found[name] = setting.distill(lesson)
        put(student, dict(as_stored(ready, student)))
        rows.append({"name": name, "technique": str(setting), "quality": measure(ready, student, teacher)})
        if name == "tuned":
            kept = {n: p.detach().clone() for n, p in student.named_parameters()}
    rows.insert(0, {"name": "teacher", "technique": None, "quality": measure(ready, teacher, teacher)})
    put(student, kept)
    with staged(Path(asked.out), asked.force) as out:
        size = write(ready, student, out)
        evidence = {
            "format": FORMAT, "version": VERSION, "command": command,
            "technique": str(ready.distiller), "paper": ready.distiller.paper,
            "student": described(ready.student), "teacher": described(ready.teacher), "bytes": size,
            "loss": {"name": ready.loss.name, "unit": ready.loss.unit},
            "data": {
                "calibration": {"source": ready.text.source, "trained": tokens_in(ready.train),
                                "judged": tokens_in(ready.judge)},
                "evaluation": {"source": ready.held_out.source, "tokens": tokens_in(ready.evaluation),
                               "same_source": ready.same_source},
            },
            "rows": rows,
            "judged": {name: [one.before, one.after] for name, one in found.items()},
            "losses": list(found["tuned"].losses),
            "seconds": dict(watch.seconds), "peak_memory": peak_memory(),
            "seed": asked.seed, "threads": asked.threads, "versions": versions(),
        }  # fmt: skip
        (out / "evidence.json").write_text(json.dumps(evidence, indent=1) + "\n", encoding="utf-8")
    return evidence


def runs_of(ready: Ready) -> list[Distiller]:
    return [ready.distiller] if ready.baseline is None else [ready.distiller, ready.baseline]


def lesson_of(
    ready: Ready, student: nn.Module, teacher: nn.Module, setting: Distiller, keeper: Saved | None = None
) -> TextLesson:
    return TextLesson(
        student, teacher, ready.loss, ready.train, ready.judge, setting.sequences, ready.asked.seed, keeper=keeper
    )


@torch.no_grad()
def put(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        parameter.copy_(values[name])


@torch.inference_mode()
def measure(ready: Ready, network: nn.Module, teacher: nn.Module) -> dict[str, float]:
    """Held-out loss to the teacher, and perplexity where the network predicts the next token."""
    lesson = TextLesson(network, teacher, ready.loss, ready.evaluation, (), AT_ONCE)
    apart, terms, surprise, labelled = 0.0, 0, 0.0, 0
    for part in range(lesson.parts):
        wanted = lesson.taught(part).output
        mine = wanted if network is teacher else lesson.see(network, part).output
        apart, terms = apart + float(lesson.distances(wanted, mine).sum()), terms + len(mine)
        labels = lesson.labels(part)
        if labels is not None:
            surprise += float(nn.functional.cross_entropy(mine, labels, reduction="sum"))
            labelled += int((labels >= 0).sum())
    found = {ready.loss.name: apart / terms}
    return found | ({"perplexity": math.exp(min(surprise / labelled, 700))} if labelled else {})


def described(network: Network) -> dict[str, Any]:
    return {
        "name": network.name,
        "class": network.architecture,
        "parameters": network.tree.parameters,
        "blocks": len(network.tree.blocks),
        "bytes": network.checkpoint.safetensors_bytes,
    }


def identity(ready: Ready) -> dict[str, Any]:
    """Everything that decides the result."""
    tokens = [[batch.tokens.tolist() for batch in part] for part in (ready.train, ready.judge)]
    return {
        "student": ready.student.checkpoint.fingerprint(),
        "teacher": ready.teacher.checkpoint.fingerprint(),
        "tokens": identity_of({"tokens": tokens}),
        "settings": [str(setting) for setting in runs_of(ready)],
        "loss": asdict(ready.loss),
        "seed": ready.asked.seed,
        "threads": ready.asked.threads,
        "versions": versions(),
    }


# ---------------------------------------------------------------- on disk


def as_stored(ready: Ready, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter as the file will hold it: in the type that the student came in."""
    stored = StoredNames(module, ready.student.checkpoint)
    for name, parameter in module.named_parameters():
        rounded = parameter.detach().to(stored.place(name).dtype)
        if not bool(torch.isfinite(rounded).all()):
            raise InputError(f"{name} has left the range of {rounded.dtype} in training; give a smaller rate")
        yield name, rounded


def write(ready: Ready, module: nn.Module, folder: Path) -> int:
    """The checkpoint: the student's own tensors, names, types, config and companions, with the trained values."""
    checkpoint = ready.student.checkpoint
    stored = StoredNames(module, checkpoint)
    trained = {stored.of[name]: value for name, value in as_stored(ready, module)}
    layout = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
    size = safetensors_file.write(
        folder / WEIGHTS,
        layout,
        lambda name: trained[name] if name in trained else checkpoint.read(name),
        METADATA,
    )
    copy_companions(checkpoint.companions, folder)
    write_config(folder, checkpoint.config)
    return size


class Saved:
    """A run's state in one file, replaced whole."""

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, time.monotonic()

    def load(self) -> Mapping[str, Tensor] | None:
        if not self.path.is_file():
            return None
        infos, _ = safetensors_file.read_header(self.path)
        return {name: safetensors_file.read(info) for name, info in infos.items()}

    def save(self, state: Mapping[str, Tensor]) -> None:
        beside = self.path.with_suffix(".part")
        layout = {name: (t.dtype, tuple(t.shape)) for name, t in state.items()}
        safetensors_file.write(beside, layout, state.__getitem__, METADATA)
        os.replace(beside, self.path)
        self.at = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.at > SAVED_EVERY


def table(evidence: Mapping[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    """(columns, rows) of what was measured, for printing."""
    metrics = list(evidence["rows"][0]["quality"])
    rows = [
        [row["name"], row["technique"] or "", *(significant(row["quality"][m], 4) for m in metrics)]
        for row in evidence["rows"]
    ]
    return ("", "technique", *metrics), rows
