"""The laws that every distiller obeys, run over the registry: a new file is tested without naming it here."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.states import same, values
from torch import Tensor, nn

from layerwise.calibrate.splits import batches_of
from layerwise.calibrate.text import read_text
from layerwise.distill.field import FieldLesson, GridField, WaveField, views
from layerwise.distill.inherit import inherit
from layerwise.distill.lesson import Lesson
from layerwise.distill.text import TextLesson
from layerwise.errors import InputError
from layerwise.loss import Loss
from layerwise.network.load import load
from layerwise.recipe import parse_distiller
from layerwise.roles import Distiller
from layerwise.technique import names

STEPS, SEQUENCES = 6, 16
KINDS = ("predicts", "embeds", "renders")


@dataclasses.dataclass(frozen=True)
class Ready:
    """A teacher with what a lesson of its kind is made of."""

    kind: str
    teacher: nn.Module
    batches: Any

    def lesson(self, seed: int = 3, keeper: Any = None) -> Lesson:
        if self.kind == "renders":
            student: nn.Module = WaveField(width=16, features=6, seed=seed)
            return FieldLesson(student, self.teacher, self.batches, 8, 48, 2, seed, keeper=keeper)
        loss = Loss("token kl" if self.kind == "predicts" else "distance")
        student, (train, judge) = inherit(self.teacher, [1]), self.batches
        return TextLesson(student, self.teacher, loss, train, judge, SEQUENCES, seed, keeper=keeper)


@pytest.fixture(scope="module", params=KINDS)
def ready(request: pytest.FixtureRequest, sentences: Path) -> Ready:
    if request.param == "renders":
        return Ready("renders", GridField(8, 16), views(2, 12, 0))
    import transformers

    folder: Path = request.getfixturevalue("tiny_llama" if request.param == "predicts" else "tiny_bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    documents = read_text(str(sentences)).documents
    batches = [
        batches_of(part, tokenizer, request.param == "predicts", 48, 16) for part in (documents[:-1], documents[-1:])
    ]
    return Ready(request.param, load(folder, dtype=torch.float32), batches)


@pytest.fixture(params=names(Distiller))
def distiller(request: pytest.FixtureRequest) -> Distiller:
    made = dataclasses.replace(parse_distiller(request.param), sequences=SEQUENCES)  # type: ignore[type-var]
    return dataclasses.replace(made, steps=STEPS)  # type: ignore[type-var]


@pytest.fixture
def lesson(ready: Ready, distiller: Distiller) -> Lesson:
    made = ready.lesson()
    try:
        distiller.check(made)
    except InputError as refusal:
        assert len(str(refusal)) > 20
        pytest.skip(str(refusal))
    return made


def test_there_are_distillers() -> None:
    assert {"logits", "hidden", "ted", "tinyclip", "pvd", "presto"} <= set(names(Distiller))


def test_every_distiller_takes_some_kind_of_lesson(ready: Ready) -> None:
    taken = set()
    for name in names(Distiller):
        try:
            parse_distiller(name).check(ready.lesson())
            taken.add(name)
        except InputError:
            pass
    assert {"predicts": {"ted", "presto", "pvd"}, "embeds": {"tinyclip", "ted"}, "renders": {"pvd"}}[
        ready.kind
    ] <= taken


def test_zero_steps_change_nothing(lesson: Lesson, distiller: Distiller) -> None:
    before = values(lesson.student)
    found = dataclasses.replace(distiller, steps=0).distill(lesson)  # type: ignore[type-var]
    assert same(before, values(lesson.student)) and found.before == found.after and not found.losses


def test_only_the_student_changes_and_its_error_falls(lesson: Lesson, distiller: Distiller) -> None:
    teacher, student, generator = values(lesson.teacher), values(lesson.student), torch.get_rng_state()
    asked = [p.requires_grad for m in (lesson.student, lesson.teacher) for p in m.parameters()]
    steps: list[int] = []
    lesson.stepped = lambda: steps.append(1)
    found = distiller.distill(lesson)
    assert same(teacher, values(lesson.teacher)) and torch.equal(generator, torch.get_rng_state())
    assert found.after <= found.before and len(found.losses) == len(steps) == distiller.steps
    assert all(torch.isfinite(v).all() for v in values(lesson.student).values())
    assert [p.requires_grad for m in (lesson.student, lesson.teacher) for p in m.parameters()] == asked
    assert all(p.grad is None for m in (lesson.student, lesson.teacher) for p in m.parameters())
    if found.after < found.before:
        assert not same(student, values(lesson.student))


def test_a_seed_decides_everything_and_a_killed_run_goes_on(ready: Ready, lesson: Lesson, distiller: Distiller) -> None:
    first = distiller.distill(lesson)

    class Killed(Exception):
        pass

    class Kept:
        """Keeps what it is given, and the first run is killed after the second time."""

        state: dict[str, Tensor] | None = None
        left = 2

        def load(self) -> dict[str, Tensor] | None:
            return self.state

        def save(self, state: Mapping[str, Tensor]) -> None:
            self.state = copy.deepcopy(dict(state))
            self.left -= 1
            if self.left == 0:
                raise Killed

        def due(self) -> bool:
            return True

    kept = Kept()
    with pytest.raises(Killed):
        distiller.distill(ready.lesson(keeper=kept))
    again = ready.lesson(keeper=kept)
    found = distiller.distill(again)
    assert same(values(lesson.student), values(again.student))
    assert (found.before, found.after, found.losses) == (first.before, first.after, first.losses)
