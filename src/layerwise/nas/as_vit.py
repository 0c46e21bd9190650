r"""As-ViT: choose and grow an architecture without training any, by two figures of networks at their first weights.

    length         L = (2 pi / n) sum_k || d f(h(t_k)) / dt ||,   h(t) = u_1 cos t + u_2 sin t,   norms left out
    conditioning   K = lambda_max(T) / lambda_min(T),   T = J J^T,   J_i = d sum_c f_c(x_i) / d weights,   norms in

L says how far the network stretches a circle of inputs (u_1, u_2 orthonormal; an orthogonal map gives 2 pi), K how well
its tangent kernel is conditioned. Both are means over draws of the weights. Candidates are ranked by K rising and by L
falling; the least sum of the two ranks wins, and a tie goes by the figure with the wider relative range.

    topology   of ``draws`` lists of ratios, at the least width, the one that wins
    growth     from the least width and depth: one block more, the next width, or both; the winner is kept until nothing
               that is larger fits the limit
    tokens     the first ``coarse`` of the training takes patches twice as far apart (the same patch weights on every
               second pixel), so a quarter of the tokens

``d f / dt`` is one derivative along a line (``torch.func.jvp``), not a pass back for every output.

Source: W. Chen et al., "Auto-scaling Vision Transformers without Training", arXiv 2202.11921. Choices of ours: the
topology is drawn instead of found by a policy; growth steps through the widths of the space, not by 5 to 20 %; one
coarse phase instead of two; weights are drawn by one rule for every candidate, since L is of degree one in each
matrix and would otherwise measure the rule.

Measured on 10,000 MNIST images (evidence row): at a budget of 300 steps it loses, to random search clearly and to its
own growth by chance slightly (1.1 times the cross-entropy). Growth by the number of parameters does a little worse.
What the coarse phase costs or gains was not measured apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from layerwise.nas._evolution import pick
from layerwise.nas._space import Architecture, Space, macs, parameters, shapes
from layerwise.nas.network import Loose, Shape, Values, block, drawn, enter, forward
from layerwise.nas.task import BACK, Found, Meter, Task, finish, fresh
from layerwise.roles import Search
from layerwise.technique import option, technique

IMAGES = 16  # of the kernel
JVP = 2  # forwards that a derivative along a line costs
LOOKING = 0.5  # share of the budget that figures may cost; growth ends there
BAD = float("inf")


@technique(
    paper="As-ViT",
    left_out="ImageNet and COCO, kernel sizes and window splits of the topology, and the search of it by a policy",
)
class AsVit(Search):
    """Chooses and grows an architecture by two figures of untrained networks, and trains only what it found."""

    rivals = ("random_search", "as_vit:score=parameters", "as_vit:score=shuffled")

    score: str = option(
        "both",
        choices=("both", "length", "kernel", "parameters", "shuffled"),
        help="what ranks candidates; parameters: the more the better, shuffled: chance",
    )
    norms: bool = option(False, help="leave the layer norms in where the length is taken")
    inits: int = option(3, minimum=1, maximum=50, help="draws of the weights that figures are means over")
    points: int = option(10, minimum=2, maximum=1000, help="points of the circle")
    draws: int = option(8, minimum=1, maximum=500, help="topologies that are looked at")
    coarse: float = option(0.2, minimum=0.0, maximum=0.9, help="share of the training with a quarter of the tokens")

    def search_in(self, task: Task) -> Found:
        space, meter, generator = task.space, Meter(task), task.generator(2)
        ratios = range(space.depths[-1])
        topologies = {tuple(pick(space.ratios, generator) for _ in ratios) for _ in range(self.draws)}
        smallest = min(task.fitting, key=lambda a: (a.width, a.depth))
        width, depth = smallest.width, smallest.depth
        fitting = set(task.fitting)
        offered = [t for t in sorted(topologies) if Architecture(width, t[:depth]) in fitting]
        offered = offered or [(space.ratios[0],) * space.depths[-1]]
        seen: list[tuple[str, float]] = []
        chosen = self._best(meter, [Architecture(width, t) for t in offered], generator, seen)
        topology = chosen.ratios if chosen else offered[0]
        here = Architecture(width, topology[:depth])
        grown: Architecture | None = here
        while grown is not None:
            here = grown
            fits = [a for a in larger(space, here, topology) if a in fitting]
            grown = self._best(meter, fits, generator, seen) if fits else None
        even = space.grid % 2 == 0
        return finish(meter, Shape((here,)), [fresh(task, here)], seen, self.coarse if even else 0.0)

    def _best(
        self, meter: Meter, offered: Sequence[Architecture], generator: torch.Generator, seen: list[tuple[str, float]]
    ) -> Architecture | None:
        """The winner; None where the budget does not pay for the figures."""
        if len(offered) == 1:
            return offered[0]
        if self.score == "shuffled":
            return pick(offered, generator)
        if self.score == "parameters":
            return max(offered, key=lambda a: parameters(meter.task.space, a))
        cost = sum(self._cost(meter.task.space, a) for a in offered)
        if meter.spent + cost > LOOKING * meter.task.budget:
            return None
        figures = [self._figures(meter, a) for a in offered]
        kernels, lengths = [k for k, _ in figures], [length for _, length in figures]
        seen += [(f"{a}, length {length:.3g}", kernel) for a, (kernel, length) in zip(offered, figures, strict=True)]
        if self.score == "length":
            return offered[max(range(len(offered)), key=lambda i: lengths[i])]
        if self.score == "kernel":
            return offered[min(range(len(offered)), key=lambda i: kernels[i])]
        return offered[least_rank_sum(kernels, lengths)]

    def _cost(self, space: Space, architecture: Architecture) -> int:
        return macs(space, architecture) * self.inits * (JVP * self.points + BACK * IMAGES)

    def _figures(self, meter: Meter, architecture: Architecture) -> tuple[float, float]:
        """(conditioning, length), means over the draws of the weights; draws are the same for all architectures."""
        task, space = meter.task, meter.task.space
        kernels, lengths = [], []
        for number in range(self.inits):
            generator = task.generator(1000 + number)
            circle = orthonormal_pair(space, generator)
            images = task.train.pixels[torch.randperm(len(task.train), generator=generator)[:IMAGES]]
            values = drawn(shapes(space, architecture), generator)
            lengths.append(length(space, architecture, values, circle, self.points, self.norms))
            kernels.append(conditioning(space, architecture, values, images))
        meter.pay(self._cost(space, architecture))
        return sum(kernels) / len(kernels), sum(lengths) / len(lengths)


def larger(space: Space, here: Architecture, topology: Sequence[int]) -> list[Architecture]:
    """One block more, the next width, and both, as far as the space goes."""
    wider = [w for w in space.widths if w > here.width][:1]
    deeper = [d for d in space.depths if d > here.depth][:1]
    found = [Architecture(here.width, tuple(topology[:d])) for d in deeper]
    found += [Architecture(w, here.ratios) for w in wider]
    return found + [Architecture(w, tuple(topology[:d])) for w in wider for d in deeper]


def least_rank_sum(kernels: Sequence[float], lengths: Sequence[float]) -> int:
    """Which has the least sum of ranks; a tie goes by the figure whose range over its mean is wider, then by order."""
    rising = ranks(kernels)
    falling = ranks([-value for value in lengths])
    sums = [a + b for a, b in zip(rising, falling, strict=True)]
    decides = rising if relative_range(kernels) > relative_range(lengths) else falling
    return min(range(len(sums)), key=lambda i: (sums[i], decides[i], i))


def ranks(figures: Sequence[float]) -> list[int]:
    """0 for the least; equal figures share the rank of the first."""
    return [sum(other < value for other in figures) for value in figures]


def relative_range(figures: Sequence[float]) -> float:
    finite = [value for value in figures if math.isfinite(value)]
    return (max(finite) - min(finite)) / abs(sum(finite) / len(finite)) if finite and sum(finite) else 0.0


def orthonormal_pair(space: Space, generator: torch.Generator) -> Tensor:
    """Two orthonormal images ``[2, channels, side, side]``."""
    drawn_pair = torch.randn(space.channels * space.side**2, 2, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn_pair)[0].T.reshape(2, space.channels, space.side, space.side).float()


def circle_length(run: Callable[[Tensor], Tensor], circle: Tensor, points: int) -> float:
    """Length of what ``run`` makes of ``u_1 cos t + u_2 sin t``: 2 pi times the mean speed at ``points`` angles."""
    angles = torch.arange(points, dtype=circle.dtype) * (2 * math.pi / points)
    shape = (points, *(1,) * (circle.dim() - 1))
    cos, sin = angles.cos().view(shape), angles.sin().view(shape)
    at, along = circle[0] * cos + circle[1] * sin, circle[1] * cos - circle[0] * sin
    speeds: Tensor = torch.func.jvp(run, (at,), (along,))[1]
    return float(speeds.detach().flatten(1).norm(dim=1).mean()) * 2 * math.pi


def length(
    space: Space, architecture: Architecture, values: Values, circle: Tensor, points: int = 10, norms: bool = False
) -> float:
    """How long the circle becomes in the hidden states before the head."""
    parts = Loose(values, norms=norms)

    def run(pixels: Tensor) -> Tensor:
        x = enter(parts, space, pixels)
        for index in range(architecture.depth):
            x = block(parts, index, x)
        return x

    return circle_length(run, circle, points)


def conditioning(space: Space, architecture: Architecture, values: Values, images: Tensor) -> float:
    """``lambda_max / lambda_min`` of the tangent kernel of the images, in float64; infinite where it is singular."""
    leaves = {name: value.detach() for name, value in values.items()}

    def one(weights: Values, image: Tensor) -> Tensor:
        return forward(Loose(weights), space, architecture.depth, image[None]).sum()

    gradients = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(leaves, images)
    rows = torch.cat([g.flatten(1) for g in gradients.values()], 1).double()
    return kernel_condition(rows)


def kernel_condition(rows: Tensor) -> float:
    """Condition number of ``J J^T`` for ``rows`` = J."""
    spectrum = torch.linalg.eigvalsh(rows @ rows.T)
    low, high = float(spectrum[0]), float(spectrum[-1])
    return high / low if low > 1e-12 * high else BAD
