"""What a search is given, what it is charged, and what it gives back.

Searches are compared at equal cost, so all are charged by one rule, in multiply-adds of the networks that they run:

    forward of n images     n * macs(architecture)
    training step           3 forwards of its batch (the pass back costs two)
    derivative along a line 2 forwards

The budget is ``steps`` training steps of the largest architecture that fits the limit. Whatever a search leaves of it
trains the network that it found, so a search that costs little trains longer: total cost is equal, not search cost.
Updates of a few values (architecture logits, routers' outputs), mixing of weights and optimisers are not charged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.nas._space import Architecture, Space, macs, parameters, shapes
from layerwise.nas.network import (
    Loose,
    Searched,
    Shape,
    Values,
    averaged,
    count_macs,
    count_parameters,
    drawn,
    forward,
)

VALIDATION = 0.2  # of the images; searches decide on it and never train weights on it
FEWEST = 40  # images
LARGEST_GRADIENT = 1.0
BACK = 3  # forwards that a step costs
JUDGED_AT_ONCE = 512


@dataclass(frozen=True, eq=False)
class Labelled:
    """``pixels`` ``[n, channels, side, side]`` float32 and ``labels`` ``[n]`` int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, index: Tensor) -> Labelled:
        return Labelled(self.pixels[index], self.labels[index])


@dataclass(frozen=True, eq=False)
class Task:
    """One search's images, space and budget.

    limit: share of the largest architecture's parameters that the found network may have.
    """

    space: Space
    train: Labelled
    valid: Labelled
    steps: int = 300
    batch: int = 64
    rate: float = 5e-3
    limit: float = 0.5
    seed: int = 0
    stepped: Callable[[float], None] = field(default=lambda share: None)

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"--{name} must be at least {least}, not {getattr(self, name)}")
        if not 0 < self.limit <= 1 or not self.rate > 0:
            raise InputError("--limit must be above 0 and at most 1, and --rate above 0")
        if not self.fitting:
            smallest = min(parameters(self.space, a) for a in self.space.architectures())
            share = smallest / parameters(self.space, self.space.largest)
            raise InputError(f"no architecture has so few parameters; --limit must be at least {share:.3f}")

    @cached_property
    def most(self) -> int:
        """Parameters that the found network may have."""
        return int(self.limit * parameters(self.space, self.space.largest))

    @cached_property
    def fitting(self) -> tuple[Architecture, ...]:
        """Architectures within the limit, smallest first."""
        sizes = {a: parameters(self.space, a) for a in self.space.architectures()}
        return tuple(sorted((a for a in sizes if sizes[a] <= self.most), key=lambda a: (sizes[a], str(a))))

    @cached_property
    def budget(self) -> int:
        return self.steps * BACK * self.batch * max(macs(self.space, a) for a in self.fitting)

    def generator(self, stream: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + stream)

    def fits(self, shape: Shape) -> bool:
        return count_parameters(self.space, shape) <= self.most


@dataclass(eq=False)
class Meter:
    """What has been spent of a task's budget, in multiply-adds."""

    task: Task
    spent: int = 0

    def pay(self, cost: int) -> None:
        self.spent += cost
        self.task.stepped(min(1.0, self.spent / self.task.budget))

    def forward(self, architecture: Architecture, images: int, times: int = 1) -> None:
        self.pay(times * images * macs(self.task.space, architecture))

    @property
    def share(self) -> float:
        return self.spent / self.task.budget


@dataclass(frozen=True, eq=False)
class Found:
    """A trained network, its losses on the validation images, and what was paid.

    searched: share of the budget that was spent before its own training began. total: share at the end, at most 1.
    seen:     what the search looked at, with the figure that it judged by.
    """

    network: Searched
    loss: float
    accuracy: float
    searched: float
    total: float
    seen: tuple[tuple[str, float], ...] = ()


def divided(images: Labelled, seed: int) -> tuple[Labelled, Labelled]:
    """(training, validation) images, drawn by the seed. ``InputError`` for too few."""
    if len(images) < FEWEST:
        raise InputError(f"a search needs at least {FEWEST} labelled images, not {len(images)}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    cut = max(1, round(VALIDATION * len(order)))
    return images.take(order[cut:]), images.take(order[:cut])


# ---------------------------------------------------------------- training


def draw(part: Labelled, count: int, generator: torch.Generator) -> Labelled:
    return part.take(torch.randint(0, len(part), (count,), generator=generator))


def pace(share: float) -> float:
    """What the peak rate is multiplied by when this share of a phase is done."""
    return min(1.0, (share + 0.01) / 0.06) * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)


def train(
    meter: Meter,
    values: Iterable[Tensor],
    until: float,
    step: Callable[[float], tuple[Tensor, int]],
    rate: float = 1.0,
) -> int:
    """AdamW steps on ``values`` until a share of the budget is spent; returns how many.

    step: share of this phase that is done -> (loss, multiply-adds of one image in its forward passes, all together).
    A step that would go beyond ``until`` is not taken.
    """
    given = list(values)
    task, begun, end = meter.task, meter.spent, int(until * meter.task.budget)
    adam = torch.optim.AdamW(given, lr=task.rate, weight_decay=0.02, foreach=False)
    done, last = 0, 0
    while meter.spent + last < end:
        share = (meter.spent - begun) / max(1, end - begun)
        loss, cost = step(share)
        last = BACK * task.batch * cost
        if meter.spent + last > end:
            break
        adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([v for v in given if v.grad is not None], LARGEST_GRADIENT, foreach=False)
        for group in adam.param_groups:
            group["lr"] = task.rate * rate * pace(share)
        adam.step()
        meter.pay(last)
        done += 1
    adam.zero_grad(set_to_none=True)
    return done


def trained_copy(values: Mapping[str, Tensor]) -> Values:
    """Leaves that can be trained, beside the given tensors."""
    return {name: value.detach().clone().contiguous().requires_grad_() for name, value in values.items()}


def train_alone(
    meter: Meter, architecture: Architecture, values: Values, until: float, generator: torch.Generator
) -> int:
    """Cross-entropy steps on one architecture's own weights."""
    task = meter.task
    cost = macs(task.space, architecture)

    def step(_: float) -> tuple[Tensor, int]:
        batch = draw(task.train, task.batch, generator)
        scores = forward(Loose(values), task.space, architecture.depth, batch.pixels)
        return F.cross_entropy(scores, batch.labels), cost

    return train(meter, values.values(), until, step)


def finish(
    meter: Meter,
    shape: Shape,
    members: Sequence[Mapping[str, Tensor]],
    seen: Sequence[tuple[str, float]] = (),
    coarse: float = 0.0,
    rate: float = 1.0,
) -> Found:
    """Train the found network with what is left of the budget: the sum of its members' cross-entropies.

    coarse: share of this training in which patches are taken twice as far apart (a quarter of the tokens).
    """
    task, searched = meter.task, meter.share
    network = Searched(task.space, shape).fill(members)
    generator = task.generator(9)

    def step(share: float) -> tuple[Tensor, int]:
        apart = 2 if share < coarse else 1
        batch = draw(task.train, task.batch, generator)
        scores = network.member_scores(batch.pixels, apart)
        loss = torch.stack([F.cross_entropy(s, batch.labels) for s in scores]).sum()
        return loss, count_macs(task.space, shape, apart)

    train(meter, network.parameters(), 1.0, step, rate)
    loss, accuracy = judged(network.eval(), task.valid)
    return Found(network, loss, accuracy, searched, meter.share, tuple(seen))


@torch.no_grad()
def judged(network: nn.Module, images: Labelled) -> tuple[float, float]:
    """(mean cross-entropy, share of right answers)."""
    loss, right = 0.0, 0
    for start in range(0, len(images), JUDGED_AT_ONCE):
        labels = images.labels[start : start + JUDGED_AT_ONCE]
        scores = network(images.pixels[start : start + JUDGED_AT_ONCE])
        loss += float(F.cross_entropy(scores, labels, reduction="sum"))
        right += int((scores.argmax(1) == labels).sum())
    return loss / len(images), right / len(images)


def judges(meter: Meter, looks: int, share: float, most: int = 256) -> Labelled:
    """The first validation images, at most ``most``, and so few that ``looks`` looks cost that share of the budget."""
    task = meter.task
    cost = looks * max(macs(task.space, a) for a in task.fitting)
    count = max(1, min(most, len(task.valid), int(share * task.budget / cost)))
    return task.valid.take(torch.arange(count))


@torch.no_grad()
def judge(meter: Meter, paths: Sequence[tuple[Architecture, Mapping[str, Tensor]]], images: Labelled) -> float:
    """Cross-entropy of one path, or of the averaged probabilities of several; charged."""
    scores = []
    for architecture, values in paths:
        meter.forward(architecture, len(images))
        scores.append(forward(Loose(values), meter.task.space, architecture.depth, images.pixels))
    return float(F.cross_entropy(averaged(scores), images.labels))


def fresh(task: Task, architecture: Architecture, stream: int = 1) -> Values:
    """First weights of an architecture of its own."""
    return drawn(shapes(task.space, architecture), task.generator(stream))
