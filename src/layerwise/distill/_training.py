"""The loop that distillers share: Adam, paced; the state of the least judged error is kept, the start included.

    rate(step) = peak * min(1, (step + 1) / W) * (0.05 + 0.95 (1 + cos(pi step / steps)) / 2),   W = steps / 20

A fifth of the way apart the judged error is taken. Everything that the run is made of goes to the lesson's keeper, so
that a killed run goes on and ends in the same bits as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from layerwise.distill.lesson import Distilled, Lesson
from layerwise.errors import InputError

if TYPE_CHECKING:
    from layerwise.roles import Distiller

LOOKS = 5  # times that the judged error is taken
LARGEST_GRADIENT = 1.0  # norm over all parameters of the student
LEAST = 0.05  # of the peak rate, at the end

Judge = Callable[[int], tuple[Tensor, int]]


def fit(
    distiller: Distiller,
    lesson: Lesson,
    rate: float,
    loss: Callable[[int, int], Tensor],
    extra: nn.Module | None = None,
    extra_rate: float = 1e-3,
    begins: int = 0,
    judge: Judge | None = None,
) -> Distilled:
    """Lower ``loss(step, part)`` in ``distiller.steps`` steps.

    extra:  parameters that are trained beside the student's, and dropped.
    begins: the first step whose loss reaches the student; its rate is paced over the steps from there on.
    judge:  part -> (sum of the terms to lower, their number); the lesson's own distance if None.
    """
    student, steps = lesson.student, distiller.steps
    asked = [(p, p.requires_grad) for m in (student, lesson.teacher) for p in m.parameters()]
    lesson.teacher.requires_grad_(False)
    student.requires_grad_(True)
    try:
        run = _Run(lesson, student, extra, judge or lesson.distance)
        draws = parts_drawn(lesson.parts, steps, lesson.seed)
        look = max(1, math.ceil(steps / LOOKS))
        for step in range(run.done, steps):
            own = rate * pace(step - begins, steps - begins) if step >= begins else 0.0
            run.step(loss(step, draws[step]), own, extra_rate, step)
            lesson.stepped()
            if (step + 1) % look == 0 or step + 1 == steps:
                run.look(step + 1)
            elif lesson.keeper is not None and lesson.keeper.due():
                run.keep(step + 1)
        return run.finish()
    finally:
        for parameter, before in asked:
            parameter.requires_grad_(before)
            parameter.grad = None


def pace(step: int, steps: int) -> float:
    """Share of the peak rate."""
    warm = max(1, steps // 20)
    cosine = (1 + math.cos(math.pi * step / max(1, steps))) / 2
    return min(1.0, (step + 1) / warm) * (LEAST + (1 - LEAST) * cosine)


def parts_drawn(parts: int, steps: int, seed: int) -> list[int]:
    """Which part each step sees: every part once before any comes again, in an order of the seed's."""
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    while len(found) < steps:
        found += torch.randperm(parts, generator=generator).tolist()
    return found[:steps]


class _Run:
    """Student, extra parameters, Adam's moments and the best state so far; all of it in ``state()``."""

    def __init__(self, lesson: Lesson, student: nn.Module, extra: nn.Module | None, judge: Judge) -> None:
        self.lesson, self.judge = lesson, judge
        self.own = {f"student.{n}": p for n, p in student.named_parameters()}
        self.beside = {f"extra.{n}": p for n, p in extra.named_parameters()} if extra is not None else {}
        groups = [{"params": list(self.own.values())}, {"params": list(self.beside.values())}]
        self.adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, weight_decay=0.0, foreach=False)
        self.losses: list[float] = []
        self.done = 0
        kept = lesson.keeper.load() if lesson.keeper is not None else None
        if kept is None:
            self.before = self.least = self.error()
            self.best = {n: p.detach().clone() for n, p in self.own.items()}
        else:
            self.restore(kept)

    def step(self, loss: Tensor, rate: float, beside: float, step: int) -> None:
        self.losses.append(float(loss.detach()))
        if not math.isfinite(self.losses[-1]):
            raise InputError(f"distillation came apart at step {step + 1}; give it a smaller rate")
        self.adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if not rate:
            for parameter in self.own.values():
                parameter.grad = None
        nn.utils.clip_grad_norm_(list(self.own.values()), LARGEST_GRADIENT)
        for group, value in zip(self.adam.param_groups, (rate, beside), strict=False):
            group["lr"] = value
        self.adam.step()

    def look(self, done: int) -> None:
        error = self.error()
        if error < self.least:
            self.least, self.best = error, {n: p.detach().clone() for n, p in self.own.items()}
        self.keep(done)

    def keep(self, done: int) -> None:
        self.done = done
        if self.lesson.keeper is not None:
            self.lesson.keeper.save(self.state())

    @torch.no_grad()
    def error(self) -> float:
        total, count = 0.0, 0
        for part in range(self.lesson.parts, self.lesson.parts + self.lesson.judged):
            found, terms = self.judge(part)
            total, count = total + float(found), count + terms
        return total / max(1, count)

    @torch.no_grad()
    def finish(self) -> Distilled:
        for name, parameter in self.own.items():
            parameter.copy_(self.best[name])
        return Distilled(self.before, self.least, tuple(self.losses))

    # ------------------------------------------------------------ what a killed run goes on from

    def state(self) -> dict[str, Tensor]:
        numbers = [float(self.done), self.before, self.least, *self.losses]
        found = {"numbers": torch.tensor(numbers, dtype=torch.float64)}
        for name, parameter in (self.own | self.beside).items():
            found[f"now.{name}"] = parameter.detach().clone()
            for moment, value in self.adam.state.get(parameter, {}).items():
                found[f"{moment}.{name}"] = torch.as_tensor(value).clone()
        return found | {f"best.{n}": p for n, p in self.best.items()}

    @torch.no_grad()
    def restore(self, kept: object) -> None:
        assert isinstance(kept, dict)
        done, self.before, self.least, *self.losses = kept["numbers"].tolist()
        self.done, self.best = int(done), {n: kept[f"best.{n}"].clone() for n in self.own}
        for name, parameter in (self.own | self.beside).items():
            parameter.copy_(kept[f"now.{name}"])
            if f"exp_avg.{name}" in kept:
                self.adam.state[parameter] = {
                    moment: kept[f"{moment}.{name}"].clone() for moment in ("step", "exp_avg", "exp_avg_sq")
                }
