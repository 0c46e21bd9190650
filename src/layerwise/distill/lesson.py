"""What distillers work on: two networks, data in parts, what each gives on a part, and how far that is apart.

    part ─┬─→ teacher ─→ states t_1 … t_L, output T ─┐
          │                                          ├─ distances(T, S) [terms]
          └─→ student ─→ states s_1 … s_l, output S ─┘

The parts ``0 … parts - 1`` are trained on, ``parts … parts + judged - 1`` decide which state of the student is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Seen:
    """What a network gave on a part.

    output: what the loss compares, [terms, ...]; for an encoder unit vectors [texts, d].
    states: what it computed on the way, shallow to deep, [rows, width] each; the rows of all are the same places.
    """

    output: Tensor
    states: tuple[Tensor, ...]


class Keeper(Protocol):
    """Where a run's state waits, so that a killed run goes on."""

    def load(self) -> Mapping[str, Tensor] | None: ...

    def save(self, state: Mapping[str, Tensor]) -> None: ...

    def due(self) -> bool:
        """Whether enough time has gone by since the last ``save`` to make another between two looks."""


class Lesson(ABC):
    """A student, its teacher and data.

    names:   of the student's states, such as ``block 1``.
    embeds:  whether outputs are unit vectors, one a text.
    seed:    of every draw that a distiller makes here.
    stepped: called after every step. keeper: None where nothing is kept.
    """

    student: nn.Module
    teacher: nn.Module
    parts: int
    judged: int
    seed: int = 0
    embeds: bool = False
    stepped: Callable[[], None] = staticmethod(lambda: None)
    keeper: Keeper | None = None

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Of the student's states, shallow to deep."""

    @abstractmethod
    def see(self, module: nn.Module, part: int, without: Collection[int] = ()) -> Seen:
        """What the student or the teacher gives on a part, differentiable in its parameters.

        without: blocks that pass their input on; their state is that input.
        """

    @abstractmethod
    def distances(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Loss of each term between two outputs [terms], 0 where they are equal."""

    def finish(self, state: Tensor, part: int) -> Tensor:
        """The output that the teacher makes of a last state [rows, its width], differentiable in the state."""
        raise NotImplementedError

    def mass(self, teacher: Seen) -> Tensor | None:
        """How much each row of the states bears on the output [rows, 1]; None where all count alike."""
        return None

    def labels(self, part: int) -> Tensor | None:
        """What the data itself says of each term, int64 [terms], -100 where it says nothing; None without labels."""
        return None

    @torch.no_grad()
    def taught(self, part: int) -> Seen:
        return self.see(self.teacher, part)

    def distance(self, part: int) -> tuple[Tensor, int]:
        """(sum of the loss's terms on a part, how many those were), for the student as it is."""
        found = self.distances(self.taught(part).output, self.see(self.student, part).output)
        return found.sum(), len(found)


@dataclass(frozen=True, eq=False)
class Distilled:
    """The judged error before and after, and what each step was to lower."""

    before: float
    after: float
    losses: tuple[float, ...]


def pairs(student: int, teacher: int) -> list[tuple[int, int]]:
    """Student state k and the teacher's state that it stands for: the last of the k-th of equal intervals."""
    return [(k, max(0, round((k + 1) * teacher / student) - 1)) for k in range(student)]
