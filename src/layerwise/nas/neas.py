r"""NEAS: an ensemble that shares its first blocks, from a space that shrinks towards good and different choices.

    members   k paths of one width; their first s blocks are the same and run once; class probabilities are averaged
    step      draw members and s from what is left of the space; the mean of their cross-entropies

A few times during the supernet's training every choice o (a feed-forward ratio of a block) is scored:

    P(o) = - mean validation loss of drawn networks that contain o
    V(o) = mean over other choices o' of the block of 1 - cos(f_o(x), f_o'(x)),   features centred over the batch
    score = z(P) + diversity * z(V),   z: standardised within the block

and the choices of least score are taken out, two at least remaining in a block. Then evolution over (members, s) by the
loss of the averaged probabilities, under the limit, where shared blocks count once. The winner's weights are cut out of
the supernet and trained on by the sum of the members' losses; from then on members have weights of their own.

Source: M. Chen et al., "One-Shot Neural Ensemble Architecture Search by Diversity-Guided Search Space Shrinking",
arXiv 2104.00597, whose released part is the retraining; the score's form is our reading. Choices of ours: V is capped
at 1, for an untrained choice differs for no good reason; shrinking begins after a warm-up; members may be equal.

Measured on 10,000 MNIST images (evidence row): at a budget of 300 steps it loses to random search (1.7 times the
cross-entropy), to one member instead of two (1.3) and to shrinking by potential alone (1.2). Two branches cost more a
step, so they have fewer steps, and nothing here trains for long enough to be in need of an ensemble.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.nas._evolution import evolve, looks, neighbour, pick
from layerwise.nas._space import Architecture, Space, shapes
from layerwise.nas.network import (
    Loose,
    Shape,
    Values,
    averaged,
    block,
    count_macs,
    drawn,
    enter,
    feed_forward,
    leave,
    sliced,
)
from layerwise.nas.task import Found, Labelled, Meter, Task, draw, finish, judges, train, trained_copy
from layerwise.roles import Search
from layerwise.technique import option, technique

LOOKING = 0.1  # share of the budget that evolution may cost
SCORING = 0.1  # and that scores of choices may
PATHS = 2  # drawn networks that a choice is scored in
REMAIN = 2  # choices that a block keeps at least
WARM = 0.4  # share of the supernet's training before the first shrinking
ATTEMPTS = 500  # draws of members that fit


@technique(
    paper="NEAS",
    left_out="ImageNet and COCO, kernel sizes and expansions of MobileNet blocks as choices, and its latency limit",
)
class Neas(Search):
    """Searches an ensemble that shares its first blocks, in a supernet whose space shrinks as it trains."""

    rivals = ("random_search", "neas:members=1", "neas:diversity=0.0")

    members: int = option(2, minimum=1, maximum=4, help="networks of the ensemble")
    diversity: float = option(1.0, minimum=0.0, maximum=100.0, help="weight of being different in a choice's score")
    shrink: str = option("score", choices=("score", "random", "none"), help="how choices to take out are found")
    rounds: int = option(3, minimum=1, maximum=20, help="of shrinking")
    removed: int = option(2, minimum=1, maximum=20, help="choices that a round takes out")
    search: float = option(0.5, minimum=0.0, maximum=0.8, help="share of the budget that the supernet takes")
    population: int = option(12, minimum=2, maximum=1000, help="ensembles that evolution begins with")
    generations: int = option(3, minimum=0, maximum=100, help="of evolution")

    def search_in(self, task: Task) -> Found:
        space, meter, generator = task.space, Meter(task), task.generator(2)
        values = trained_copy(drawn(shapes(space, space.largest), task.generator(1)))
        left = [list(space.ratios) for _ in range(space.depths[-1])]

        def step(_: float) -> tuple[Tensor, int]:
            shape = self._drawn(task, left, generator)
            batch = draw(task.train, task.batch, generator)
            losses = [F.cross_entropy(s, batch.labels) for s in shared_scores(values, space, shape, batch.pixels)]
            return torch.stack(losses).mean(), count_macs(space, shape)

        for number in range(self.rounds):
            until = WARM + (1 - WARM) * number / self.rounds
            train(meter, values.values(), self.search * until, step)
            if self.shrink != "none":
                self._shrink(meter, values, left, generator)
        train(meter, values.values(), self.search, step)
        images = judges(meter, looks(self.population, self.generations), LOOKING)
        ranked = evolve(
            lambda: self._drawn(task, left, generator),
            lambda shape: self._changed(task, shape, left, generator),
            lambda shape: ensemble_loss(meter, values, shape, images),
            self.population,
            self.generations,
            generator,
        )
        best = ranked[0][0]
        weights = [sliced(values, shapes(space, member)) for member in best.members]
        return finish(meter, best, weights, [(str(shape), loss) for shape, loss in ranked])

    # ------------------------------------------------------------ drawing

    def _drawn(self, task: Task, left: Sequence[Sequence[int]], generator: torch.Generator, at: int = -1) -> Shape:
        """Members of one width that fit together; of depth above ``at``. The least that there is after many draws."""
        space = task.space
        depths = [d for d in space.depths if d > at]
        for _ in range(ATTEMPTS):
            width = pick(space.widths, generator)
            ratios = [[pick(r, generator) for r in left[: pick(depths, generator)]] for _ in range(self.members)]
            shared = int(torch.randint(0, min(map(len, ratios)) + 1, (1,), generator=generator))
            shape = joined(width, ratios, shared)
            if task.fits(shape):
                return shape
        least = Architecture(space.widths[0], tuple(min(r) for r in left[: depths[0]]))
        return Shape((least,) * self.members, least.depth)

    def _changed(
        self, task: Task, shape: Shape, left: Sequence[Sequence[int]], generator: torch.Generator
    ) -> Shape:  # fmt: skip
        """The split one block earlier or later, or one choice of one member; the same shape where that does not fit."""
        members, shared = list(shape.members), shape.shared
        kind = int(torch.randint(0, 1 + len(members), (1,), generator=generator))
        if kind == 0:
            shared = max(0, min(shared + (1 if pick((0, 1), generator) else -1), *(m.depth for m in members)))
        else:
            members[kind - 1] = neighbour(task.space, members[kind - 1], left, generator)
        lead = members[max(0, kind - 1)]
        shared = min(shared, *(m.depth for m in members))
        ratios = [[*lead.ratios[:shared], *m.ratios[shared:]] for m in members]
        made = joined(lead.width, ratios, shared)
        return made if task.fits(made) else shape

    # ------------------------------------------------------------ shrinking

    def _shrink(self, meter: Meter, values: Values, left: list[list[int]], generator: torch.Generator) -> None:
        """Take out the choices of least score, over all blocks."""
        offered = [(i, r) for i, block_left in enumerate(left) if len(block_left) > REMAIN for r in block_left]
        if self.shrink == "random":
            order = torch.randperm(len(offered), generator=generator).tolist()
            worst = [offered[i] for i in order]
        else:
            scores = self._scores(meter, values, left, generator)
            worst = sorted(offered, key=lambda choice: (scores[choice], choice))
        gone = 0
        for index, ratio in worst:
            if gone < self.removed and len(left[index]) > REMAIN:
                left[index].remove(ratio)
                gone += 1

    def _scores(
        self, meter: Meter, values: Values, left: Sequence[Sequence[int]], generator: torch.Generator
    ) -> dict[tuple[int, int], float]:
        task, found = meter.task, {}
        looks_taken = sum(map(len, left)) * (PATHS + 1) * self.rounds
        images = judges(meter, looks_taken, SCORING)
        for index, choices in enumerate(left):
            potentials = []
            for ratio in choices:
                only = [*left[:index], [ratio], *left[index + 1 :]]
                drawn_shapes = [self._drawn(task, only, generator, index) for _ in range(PATHS)]
                potentials.append(-sum(ensemble_loss(meter, values, s, images) for s in drawn_shapes) / PATHS)
            state = self._arriving(meter, values, left, index, images, generator)
            features = [self._feature(values, task.space, state, index, ratio) for ratio in choices]
            scores = standardised(potentials)
            for place, other in enumerate(standardised(diversities(features))):
                found[index, choices[place]] = scores[place] + self.diversity * other
        return found

    @torch.no_grad()
    def _arriving(
        self, meter: Meter, values: Values, left: Sequence[Sequence[int]], index: int, images: Labelled,
        generator: torch.Generator,
    ) -> Tensor:  # fmt: skip
        """What one drawn path at the widest brings to a block."""
        space = meter.task.space
        path = Architecture(space.widths[-1], tuple(pick(r, generator) for r in left[: index + 1]))
        meter.forward(path, len(images))
        parts = Loose(sliced(values, shapes(space, path)))
        x = enter(parts, space, images.pixels)
        for number in range(index):
            x = block(parts, number, x)
        return x

    @torch.no_grad()
    def _feature(self, values: Values, space: Space, x: Tensor, index: int, ratio: int) -> Tensor:
        path = Architecture(space.widths[-1], (ratio,) * (index + 1))
        parts = Loose(sliced(values, shapes(space, path)))
        return feed_forward(parts, index, parts.norm(f"blocks.{index}.norm2", x)).flatten(1)


def joined(width: int, ratios: Sequence[Sequence[int]], shared: int) -> Shape:
    """Members whose first ``shared`` blocks are those of the first."""
    first = ratios[0][:shared]
    return Shape(tuple(Architecture(width, (*first, *own[shared:])) for own in ratios), shared)


def shared_scores(values: Values, space: Space, shape: Shape, pixels: Tensor) -> list[Tensor]:
    """Scores of every member with the supernet's weights; shared blocks run once."""
    first = shape.members[0]
    trunk = Loose(sliced(values, shapes(space, first)))
    x = enter(trunk, space, pixels)
    for index in range(shape.shared):
        x = block(trunk, index, x)
    found = []
    for member in shape.members:
        parts, y = Loose(sliced(values, shapes(space, member))), x
        for index in range(shape.shared, member.depth):
            y = block(parts, index, y)
        found.append(leave(parts, y))
    return found


@torch.no_grad()
def ensemble_loss(meter: Meter, values: Values, shape: Shape, images: Labelled) -> float:
    """Cross-entropy of the averaged probabilities; charged."""
    meter.pay(len(images) * count_macs(meter.task.space, shape))
    return float(
        F.cross_entropy(averaged(shared_scores(values, meter.task.space, shape, images.pixels)), images.labels)
    )


def diversities(features: Sequence[Tensor]) -> list[float]:
    """Mean over the others of ``1 - cos``, of features ``[n, ...]`` centred over the batch; at most 1 each."""
    centred = [F.normalize((f - f.mean(0)).flatten(), dim=0) for f in features]
    apart = 1 - torch.stack(centred) @ torch.stack(centred).T
    apart.fill_diagonal_(0.0)
    return [float(row.clamp(0.0, 1.0).sum()) / max(1, len(features) - 1) for row in apart]


def standardised(figures: Sequence[float]) -> list[float]:
    """Mean 0 and deviation 1; zeros where all are equal."""
    mean = sum(figures) / len(figures)
    deviation = math.sqrt(sum((f - mean) ** 2 for f in figures) / len(figures))
    return [(f - mean) / deviation if deviation > 1e-12 else 0.0 for f in figures]
