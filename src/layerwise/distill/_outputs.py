"""The loss on outputs that distillers share, and what it asks of a lesson."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from layerwise.distill.lesson import Lesson
from layerwise.errors import InputError

if TYPE_CHECKING:
    from layerwise.roles import Distiller


def softened(lesson: Lesson, teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2`` times the mean loss of two outputs divided by T."""
    return temperature**2 * lesson.distances(teacher / temperature, student / temperature).mean()


def of_labels(lesson: Lesson, part: int, output: Tensor) -> Tensor:
    """Mean cross-entropy of the data's own labels."""
    labels = lesson.labels(part)
    assert labels is not None
    return nn.functional.cross_entropy(output, labels)


def check_labels(asked: Distiller, lesson: Lesson) -> None:
    if lesson.labels(0) is None:
        raise InputError(f"{asked} learns from next tokens, which only a causal language model predicts")


def check_widths(asked: Distiller, lesson: Lesson) -> None:
    """``InputError`` unless outputs are of one width, so that they can be compared."""
    with torch.no_grad():
        mine = lesson.see(lesson.student, 0).output.shape[-1]
    other = lesson.taught(0).output.shape[-1]
    if mine != other:
        raise InputError(
            f"{asked.name} compares outputs, and the student's have {mine} numbers where the teacher's have {other}; "
            f"tinyclip takes vectors of different widths"
        )
