"""TED's filters: identities are layer-wise distillation, stage I trains nothing else, nuisances are filtered out."""

from __future__ import annotations

import dataclasses

import torch
from tests.distill.toys import Stack, StackLesson
from torch import nn

from layerwise.distill._layers import gap, gaps, matchers
from layerwise.recipe import parse_distiller


def test_identity_filters_are_layer_wise_distillation_to_the_bit() -> None:
    lesson = StackLesson(Stack(8, 12, 5, 1), Stack(8, 12, 5, 0), 8)
    matched, maps = matchers(lesson)
    mine, other = lesson.see(lesson.student, 0), lesson.taught(0)
    assert torch.equal(gaps(mine, other, matched, maps, [nn.Identity()]), gap(mine.states[0], other.states[0]))
    same = gaps(other, other, matched, maps, [nn.Identity()])
    assert float(same) == 0


def test_stage_one_leaves_both_networks_alone() -> None:
    lesson = StackLesson(Stack(8, 12, 5, 1), Stack(8, 12, 5, 0), 8)
    given = {n: p.detach().clone() for n, p in lesson.student.named_parameters()}
    moved: list[bool] = []
    lesson.stepped = lambda: moved.append(
        any(not torch.equal(given[n], p) for n, p in lesson.student.named_parameters())
    )
    parse_distiller("ted:steps=8,first=0.5").distill(lesson)
    assert moved == [False] * 4 + [True] * 4


def test_what_the_task_does_not_use_is_not_matched() -> None:
    """32 features that nothing reads stand beside 8 that the head reads: a student of width 8 cannot match both."""
    after = {}
    for setting in ("logits", "hidden", "ted", "ted:learned=false"):
        student, teacher = Stack(24, 8, 6, 1), Stack(24, 8, 6, 0, noise=32)
        distiller = dataclasses.replace(parse_distiller(setting), steps=300, rate=0.03)  # type: ignore[type-var, call-arg]
        if setting != "logits":
            distiller = dataclasses.replace(distiller, weight=5.0)  # type: ignore[call-arg]
        after[setting] = distiller.distill(StackLesson(student, teacher, 24)).after
    assert all(after["ted"] < 0.7 * value for setting, value in after.items() if setting != "ted"), after
