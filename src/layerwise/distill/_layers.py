"""Comparing states layer by layer, through a learnt map where the widths differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from layerwise.distill.lesson import Lesson, Seen, pairs


def matchers(lesson: Lesson, part: int = 0) -> tuple[list[tuple[int, int]], nn.ModuleList]:
    """(pairs of states, a map of the student's width to the teacher's for each).

    The map is the identity, with nothing to learn, where the widths are equal; else a linear without bias, its columns
    orthonormal at the start, or its rows where it narrows.
    """
    with torch.no_grad():
        mine, other = lesson.see(lesson.student, part).states, lesson.taught(part).states
    matched = pairs(len(mine), len(other))
    generator = torch.Generator().manual_seed(lesson.seed)
    maps = [matcher(mine[k].shape[-1], other[j].shape[-1], generator) for k, j in matched]
    return matched, nn.ModuleList(maps)


def matcher(columns: int, rows: int, generator: torch.Generator) -> nn.Module:
    return nn.Identity() if rows == columns else orthonormal(columns, rows, generator)


def orthonormal(columns: int, rows: int, generator: torch.Generator) -> nn.Linear:
    """A linear [rows, columns] without bias, drawn so that its shorter side is orthonormal."""
    made = nn.Linear(columns, rows, bias=False, device="meta").to_empty(device="cpu")
    drawn = torch.randn(max(rows, columns), min(rows, columns), generator=generator)
    basis = torch.linalg.qr(drawn).Q
    with torch.no_grad():
        made.weight.copy_(basis if rows >= columns else basis.T)
    return made


def gap(student: Tensor, teacher: Tensor, mass: Tensor | None = None) -> Tensor:
    """Mean squared difference, as a share of the teacher's mean square: layers of any scale count alike.

    mass: of each row [rows, 1]; all alike if None.
    """
    apart, own = (student - teacher).square(), teacher.square()
    if mass is not None:
        apart, own = mass * apart, mass * own
    return apart.mean() / own.mean().clamp(min=1e-12)


def gaps(
    mine: Seen, other: Seen, matched: Sequence[tuple[int, int]], maps: nn.ModuleList, of_teacher: Iterable[nn.Module]
) -> Tensor:
    """Mean over the pairs of the gap between mapped states."""
    terms = [
        gap(own(mine.states[k]), their(other.states[j]))
        for (k, j), own, their in zip(matched, maps, of_teacher, strict=True)
    ]
    return torch.stack(terms).mean()
