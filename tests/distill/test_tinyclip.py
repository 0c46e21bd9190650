"""TinyCLIP's tables: what they do not see, what their divergence is bounded by, and what copying vectors loses."""

from __future__ import annotations

import pytest
import torch
from tests.distill.toys import Stack, StackLesson
from torch import nn

from layerwise.distill._tables import affinity_gap, tables
from layerwise.errors import InputError
from layerwise.recipe import parse_distiller

TAU = 0.1


def vectors(count: int, width: int, seed: int) -> torch.Tensor:
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.functional.normalize(drawn, dim=-1)


def test_a_common_rotation_changes_no_table_but_every_vector() -> None:
    found = vectors(16, 6, 0)
    turn = torch.linalg.qr(vectors(6, 6, 1)).Q
    assert float(affinity_gap(found, found @ turn, TAU, TAU)) == pytest.approx(0, abs=1e-12)
    assert float((found - found @ turn).square().sum(-1).mean()) > 0.1


def test_the_gap_is_never_negative_and_zero_for_equal_tables() -> None:
    one, other = vectors(16, 6, 0), vectors(16, 9, 2)  # of different widths
    assert float(affinity_gap(one, one, TAU, TAU)) == 0
    assert float(affinity_gap(one, other, TAU, TAU)) > 0.01


def test_the_gradient_is_the_difference_of_the_tables() -> None:
    one, other = vectors(12, 6, 0), vectors(12, 6, 2)
    logits = (other[0::2] @ other[1::2].T / TAU).requires_grad_(True)
    wanted = tables(one, TAU)[0].exp()
    (-(wanted * logits.log_softmax(-1)).sum(-1).mean()).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert torch.allclose(logits.grad, (tables(other, TAU)[0].exp() - wanted) / 6, atol=1e-12)


def test_a_student_of_another_width_is_taught_and_vectors_cannot_be() -> None:
    lesson = StackLesson(Stack(8, 16, 4, 1), Stack(8, 16, 12, 0), 8, embeds=True)
    found = parse_distiller("tinyclip:steps=60,rate=0.01,temperature=0.2").distill(lesson)
    assert found.after < 0.8 * found.before
    with pytest.raises(InputError, match=r"tinyclip takes vectors of different widths"):
        parse_distiller("logits").check(lesson)


def test_copying_the_table_beats_copying_vectors_where_the_student_is_narrow() -> None:
    """A student of 3 features cannot make the teacher's vectors; what is judged is the table, in as many steps."""
    after = {}
    for mimic in ("affinity", "vectors"):
        lesson = StackLesson(Stack(12, 3, 12, 1), Stack(12, 24, 12, 0), 12, embeds=True)
        setting = f"tinyclip:steps=100,rate=0.01,temperature=0.2,mimic={mimic}"
        after[mimic] = parse_distiller(setting).distill(lesson).after
    assert after["affinity"] < 0.9 * after["vectors"], after
