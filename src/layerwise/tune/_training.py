"""The loop that tuners share: steps on one part each, and the state of the least error over all parts is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from layerwise.encoding.encoded import Encoded
from layerwise.tune._rounding import draws
from layerwise.tune.scope import Tuned, TunedScope

if TYPE_CHECKING:
    from layerwise.roles import Tuner

LOOKS = 10  # times that the error over all parts is taken


class State(Protocol):
    """What is learned of one linear."""

    def weight(self) -> Tensor:
        """W' [out, in]: bit for bit what ``encoded().decode()`` is, differentiable."""

    def encoded(self) -> Encoded:
        """The state as it is stored."""


S = TypeVar("S", bound=State)


def fit(
    tuner: Tuner,
    scope: TunedScope,
    learn: Callable[[Encoded, Tensor], S],
    descend: Callable[[Mapping[str, S], float], None],
    backward: Callable[[Mapping[str, S], int], None] | None = None,
    passes: int = 1,
) -> Tuned:
    """Tune what ``tuner`` touches in ``tuner.passes()`` passes through the scope.

    learn:    a linear's stored form and its dense matrix -> the state to start from.
    descend:  (states whose gradients are known, share of the steps that is over) -> one step; forgets the gradients.
    backward: (states, part) -> gradients of what one step is to lower; of the scope's mean loss there if None.
    passes:   how many of them one step takes.

    The start is among the states of which the best is kept, so the error never ends above where it began.
    """
    given = {path: form for path, form in scope.encoded.items() if tuner.touches(form)}
    before = least = scope.error(given)
    steps, best = tuner.passes() // passes, given
    if not given or not steps or not scope.parts:
        return Tuned({}, before, before)
    learned = {path: learn(form, scope.weights[path]) for path, form in given.items()}
    look = max(1, steps // LOOKS)
    for step, part in enumerate(draws(scope.parts, steps, scope.seed)):
        with torch.enable_grad():
            if backward is not None:
                backward(learned, part)
            else:
                losses, terms = scope.losses({path: at.weight() for path, at in learned.items()}, part)
                (losses / terms).backward()  # type: ignore[no-untyped-call]
        descend(learned, step / steps)
        if (step + 1) % look == 0 or step + 1 == steps:
            found: dict[str, Encoded] = {path: at.encoded() for path, at in learned.items()}
            error = scope.error(found)
            if error < least:
                best, least = found, error
        for _ in range(passes):
            scope.advance()
    return Tuned({path: form for path, form in best.items() if form is not given[path]}, before, least)


class Adam:
    """Adam on tensors that each have a rate of their own; no weight decay. Kingma and Ba, arXiv 1412.6980."""

    def __init__(self, beta1: float = 0.9, beta2: float = 0.99, floor: float = 1e-12) -> None:
        self.beta1, self.beta2, self.floor = beta1, beta2, floor
        self.moments: dict[int, tuple[Tensor, Tensor]] = {}
        self.count = 0

    @torch.no_grad()
    def step(self, rated: Iterable[tuple[Tensor, float]]) -> None:
        """One step of every (value, rate); the gradients are forgotten."""
        self.count += 1
        first, second = 1 - self.beta1**self.count, 1 - self.beta2**self.count
        for value, rate in rated:
            gradient = value.grad
            if gradient is None:
                continue
            mean, square = self.moments.setdefault(id(value), (torch.zeros_like(value), torch.zeros_like(value)))
            mean.lerp_(gradient, 1 - self.beta1)
            square.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
            value.addcdiv_(mean, (square.sqrt() / math.sqrt(second)).add_(self.floor), value=-rate / first)
            value.grad = None
