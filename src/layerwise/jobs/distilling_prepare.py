"""Everything that is checked before a distillation starts: networks, tokenizers, text; and how long it will take.

Which text is trained on, judged on and measured on: seven eighths of the calibration text, the last eighth, and
``--evaluate``, or else a tenth of the calibration text that is set aside first.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from layerwise.acts.forecast import PROCESS_BYTES, multiplications_per_second
from layerwise.acts.prepare import check_out, check_tokens, longest, open_tokenizer
from layerwise.calibrate.splits import batches_of, set_aside, shuffled, tokens_in
from layerwise.calibrate.text import Text, read_text, refuse_overlap
from layerwise.distill.text import check_same_tables
from layerwise.errors import InputError
from layerwise.loss import Loss, loss_of_network
from layerwise.network.checkpoint import open_checkpoint
from layerwise.network.network import Network, open_network, output_width, reads_images
from layerwise.network.streaming import Batch
from layerwise.recipe import parse_distiller
from layerwise.report.figures import duration, megabytes
from layerwise.roles import Distiller

BASELINE = "logits"
FEWEST_TOKENS = 256  # of the text that judges, and of the text that is measured on
JUDGED = 0.125  # of the documents
HELD_VALUES = 8  # float32 a weight of the student: itself, gradient, two moments, best state, and what is written


@dataclass(frozen=True)
class Distillation:
    """What ``layerwise tune`` is asked for; the names are those of the command line."""

    student: str
    out: str
    teacher: str
    technique: str
    calibrate: str
    evaluate: str | None = None
    sequences: int = 512
    length: int = 128
    text_column: str | None = None
    pooling: str | None = None
    seed: int = 0
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    work: str | None = None
    baseline: bool = True
    force: bool = False

    def __post_init__(self) -> None:
        for name, low in (("sequences", 4), ("length", 8), ("threads", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise InputError(f"--{name} must be at least {low}, not {getattr(self, name)}")


@dataclass(frozen=True)
class Ready:
    """A run that may begin: everything that the user gave has been checked."""

    asked: Distillation
    distiller: Distiller
    student: Network
    teacher: Network
    loss: Loss
    text: Text
    held_out: Text
    same_source: bool
    train: tuple[Batch, ...]
    judge: tuple[Batch, ...]
    evaluation: tuple[Batch, ...]

    @property
    def baseline(self) -> Distiller | None:
        """Plain distillation at the same pace; None where it is not wanted, or would be the same."""
        if not self.asked.baseline or not self.distiller.steps:
            return None
        pace = {name: getattr(self.distiller, name) for name in ("steps", "sequences", "rate")}
        found = replace(parse_distiller(BASELINE), **pace)  # type: ignore[type-var]
        return None if found == self.distiller else found


@dataclass(frozen=True)
class DistillationForecast:
    """Seconds and bytes; a model, not a measurement."""

    steps: int
    tokens: int
    seconds: float
    memory: int

    def rows(self) -> list[tuple[str, str]]:
        return [
            ("steps", f"{self.steps:,} of about {self.tokens:,} tokens each"),
            ("time", f"about {duration(self.seconds)}"),
            ("memory", f"about {megabytes(self.memory)}"),
        ]


def prepare_distillation(asked: Distillation) -> Ready:
    """Open and check everything; reads headers and text, not weights."""
    distiller = parse_distiller(asked.technique)
    check_out(Path(asked.out), asked.force)
    student, teacher = open_student(asked.student), open_network(asked.teacher)
    for network in (student, teacher):
        if reads_images(network):
            raise InputError(f"{network.name} reads images; tune trains networks that read text")
        if any(site.experts for site in network.tree.sites):
            raise InputError(f"{network.name} is a Mixture-of-Experts; tune trains networks without experts")
    loss, other = (loss_of_network(network, asked.pooling) for network in (student, teacher))
    if (loss.kind, loss.causal, loss.pooling) != (other.kind, other.causal, other.pooling):
        raise InputError(
            f"a {student.architecture} cannot learn from a {teacher.architecture}: what they give is not of one kind"
        )
    tokenizer = open_tokenizer(student)
    if tokenizer.get_vocab() != open_tokenizer(teacher).get_vocab():
        raise InputError(f"{student.name} and {teacher.name} have different tokenizers; distillation needs one")
    check_same_tables(student.module, teacher.module)
    length = min(asked.length, longest(student), longest(teacher))
    text = read_text(asked.calibrate, asked.text_column)
    if asked.evaluate is not None:
        held_out, same_source = read_text(asked.evaluate, asked.text_column), False
        refuse_overlap(text, held_out)
    else:
        (text, held_out), same_source = set_aside(text, asked.seed), True
    documents = shuffled(text.documents, asked.seed)
    cut = min(len(documents) - 1, round((1 - JUDGED) * len(documents)))
    if cut < 1:
        raise InputError(f"{text.source} is too short to be divided into text to train and to judge on; give more text")
    count = asked.sequences
    train = batches_of(documents[:cut], tokenizer, loss.causal, count, length)
    judge = batches_of(
        documents[cut:], tokenizer, loss.causal, max(math.ceil(FEWEST_TOKENS / length), JUDGED * count), length
    )
    evaluation = batches_of(held_out.documents, tokenizer, loss.causal, max(64, count // 4), length)
    for batches, source in ((train, text), (judge, text), (evaluation, held_out)):
        if tokens_in(batches) < FEWEST_TOKENS:
            raise InputError(
                f"{source.source} gives {tokens_in(batches)} tokens where {FEWEST_TOKENS} are the least; give more text"
            )
        check_tokens(batches, source, student)
    return Ready(asked, distiller, student, teacher, loss, text, held_out, same_source, train, judge, evaluation)


def open_student(path: str) -> Network:
    """The student, which must be dense."""
    if "quantization_config" in open_checkpoint(path).config:
        raise InputError(
            f"{path} holds matrices in stored forms; tune trains plain checkpoints: use compress --tune for stored "
            f"forms, or layerwise export --to dense first"
        )
    return open_network(path)


def forecast_distillation(ready: Ready) -> DistillationForecast:
    """What a run will take, from shapes and the machine's rate."""
    runs = 1 if ready.baseline is None else 2
    per_step = max(1, round(tokens_in(ready.train) / max(1, sum(len(b.tokens) for b in ready.train))))
    per_step *= min(ready.distiller.sequences, max(len(b.tokens) for b in ready.train))
    matrices = [
        sum(s.parameters for s in network.tree.sites if s.kind in ("linear", "head") or s.head)
        for network in (ready.student, ready.teacher)
    ]
    trained = ready.distiller.steps * per_step * (6 * matrices[0] + 2 * matrices[1])
    measured = 2 * (5 * tokens_in(ready.judge) + 2 * tokens_in(ready.evaluation)) * sum(matrices)
    seconds = 5 + 1.5 * runs * (trained + measured) / multiplications_per_second(ready.asked.threads)
    outputs = 6 * 4 * per_step * output_width(ready.student)
    held = 4 * (HELD_VALUES * ready.student.tree.parameters + ready.teacher.tree.parameters)
    return DistillationForecast(ready.distiller.steps, per_step, seconds, PROCESS_BYTES + held + outputs)
