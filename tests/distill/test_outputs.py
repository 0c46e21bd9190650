"""Plain distillation's gradient, its temperature, and the teacher left out; what all six declare."""

from __future__ import annotations

import pytest
import torch
from tests.distill.toys import Stack, StackLesson

from layerwise.distill._layers import gap, orthonormal
from layerwise.distill._outputs import softened
from layerwise.distill._training import parts_drawn
from layerwise.distill.lesson import pairs
from layerwise.papers.catalogue import paper_named
from layerwise.recipe import parse_distiller


def lesson(seed: int = 0) -> StackLesson:
    return StackLesson(Stack(8, 6, 5, seed + 1), Stack(8, 16, 5, 0), 8)


def test_the_gradient_is_the_difference_of_the_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 7, 5, generator=generator)
    student.requires_grad_(True)
    softened(lesson(), teacher, student).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert torch.allclose(student.grad, (student.detach().softmax(-1) - teacher.softmax(-1)) / 7, atol=1e-7)


def test_a_high_temperature_compares_centred_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    centred = [z - z.mean(-1, keepdim=True) for z in (teacher, student)]
    wanted = (centred[0] - centred[1]).square().sum(-1).mean() / (2 * 5)
    assert float(softened(lesson(), teacher, student, 1000.0)) == pytest.approx(float(wanted), rel=1e-2)


def test_the_teacher_is_what_lowers_the_loss() -> None:
    taught, same = lesson(), lesson()
    found = parse_distiller("logits:steps=60,rate=0.02").distill(taught)
    assert found.after < 0.5 * found.before
    same.teacher = same.student
    idle = parse_distiller("logits:steps=5").distill(same)
    assert idle.before == idle.after == 0


def test_parts_come_once_before_any_comes_again() -> None:
    drawn = parts_drawn(5, 13, 3)
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == list(range(5)) and drawn != parts_drawn(5, 13, 4)


def test_pairs_are_the_last_of_equal_intervals() -> None:
    assert pairs(3, 6) == [(0, 1), (1, 3), (2, 5)] and pairs(2, 2) == [(0, 0), (1, 1)] and pairs(1, 4) == [(0, 3)]


def test_maps_begin_orthonormal_and_gaps_do_not_know_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    for columns, rows in ((4, 7), (7, 4)):
        weight = orthonormal(columns, rows, generator).weight.detach()
        short = weight.T @ weight if rows >= columns else weight @ weight.T
        assert torch.allclose(short, torch.eye(min(rows, columns)), atol=1e-5)
    a, b = torch.randn(2, 9, 4, generator=generator)
    assert float(gap(8 * a, 8 * b)) == pytest.approx(float(gap(a, b)), rel=1e-5)


@pytest.mark.parametrize("name", ["ted", "tinyclip", "pvd", "presto"])
def test_papers_are_named_as_the_catalogue_names_them(name: str) -> None:
    found = parse_distiller(name)
    paper = paper_named(found.paper)
    assert paper is not None and paper.short == found.paper and found.left_out
