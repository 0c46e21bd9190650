r"""Mixture-of-Supernets: every linear of the supernet has m expert weights, and the architecture decides their mixture.

    layer     W_a = sum_i alpha_i E_i[slice of a],        alpha = softmax(router(code of a))           [m]
    neuron    W_a = sum_i diag(beta_i) E_i[slice of a],   beta  = softmax over i of router(code of a)  [rows, m]

Sub-networks of a plain supernet (m = 1) fight over the same weights; here those that differ may draw on different ones.
The router of each linear is a perceptron of two layers that sees the choices (width, depth, ratios, in [0, 1]) and no
image, so the mixture is folded into plain weights once the search is over: the network that ships has no experts.

Training is by the sandwich rule: each step runs the largest architecture that fits, the smallest, and ``drawn`` others;
the others learn from the largest's probabilities. Then evolution on the validation loss of folded networks.

Source: G. Jawahar et al., "Mixture-of-Supernets: Improving Weight-Sharing Supernet Training with Architecture-Routed
Mixture-of-Experts", arXiv 2306.04845. Choices of ours: experts start different (equal ones would never separate) and
sqrt(m) larger, so that their mean is as large as a plain weight; the routers' last layers start small; norms and
positions stay shared.

Measured on 10,000 MNIST images (evidence row): at a budget of 300 steps it loses to random search (1.6 times the
cross-entropy). Held against its own supernet, routers that see the architecture do better than blind ones (0.95 times
the cross-entropy) and no better than a plain supernet of one expert (1.00, within the spread of the seeds).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.nas._evolution import evolve, looks, neighbour, pick
from layerwise.nas._space import Architecture, Space, macs, shapes
from layerwise.nas.network import Loose, Shape, Values, drawn, forward, sliced
from layerwise.nas.task import Found, Meter, Task, draw, finish, judge, judges, train, trained_copy
from layerwise.roles import Search
from layerwise.technique import option, technique

HIDDEN = 32  # of a router
FIRST_ROUTES = 0.01  # deviation of a router's last layer
LOOKING = 0.15  # share of the budget that judging may cost


@technique(
    paper="Mixture-of-Supernets",
    left_out="translation and BERT supernets, where its figures are from, and a search under measured latency",
)
class MixtureOfSupernets(Search):
    """A supernet whose linears are mixtures of experts, mixed by a router that sees the architecture."""

    rivals = ("random_search", "mixture_of_supernets:experts=1", "mixture_of_supernets:blind=true")

    experts: int = option(2, minimum=1, maximum=8, help="weights of every linear; 1 is a plain supernet")
    routing: str = option("neuron", choices=("layer", "neuron"), help="one mixture a linear, or one a row of it")
    blind: bool = option(False, help="routers see zeros instead of the architecture")
    drawn: int = option(1, minimum=0, maximum=8, help="architectures of a step beside the largest and the smallest")
    search: float = option(0.6, minimum=0.0, maximum=0.8, help="share of the budget that the supernet takes")
    population: int = option(16, minimum=2, maximum=1000, help="architectures that evolution begins with")
    generations: int = option(3, minimum=0, maximum=100, help="of evolution")

    def search_in(self, task: Task) -> Found:
        space, meter, generator = task.space, Meter(task), task.generator(2)
        supernet = Supernet.drawn(space, self.experts, self.routing, self.blind, task)
        smallest, largest = task.fitting[0], task.fitting[-1]

        def step(_: float) -> tuple[Tensor, int]:
            batch = draw(task.train, task.batch, generator)
            scores = forward(Loose(supernet.folded(largest)), space, largest.depth, batch.pixels)
            loss, cost = F.cross_entropy(scores, batch.labels), macs(space, largest)
            taught = scores.detach().softmax(-1)
            others = [smallest, *(pick(task.fitting, generator) for _ in range(self.drawn))]
            for other in others:
                made = forward(Loose(supernet.folded(other)), space, other.depth, batch.pixels)
                loss, cost = loss + F.cross_entropy(made, taught), cost + macs(space, other)
            return loss / (1 + len(others)), cost

        train(meter, supernet.leaves(), self.search, step)
        images = judges(meter, looks(self.population, self.generations), LOOKING)
        fitting = set(task.fitting)

        def changed(architecture: Architecture) -> Architecture:
            other = neighbour(space, architecture, [space.ratios] * space.depths[-1], generator)
            return other if other in fitting else architecture

        def loss_of(architecture: Architecture) -> float:
            with torch.no_grad():
                return judge(meter, [(architecture, supernet.folded(architecture))], images)

        ranked = evolve(
            lambda: pick(task.fitting, generator), changed, loss_of, self.population, self.generations, generator
        )
        best = ranked[0][0]
        with torch.no_grad():
            weights = supernet.folded(best)
        return finish(meter, Shape((best,)), [weights], [(str(a), loss) for a, loss in ranked])


@dataclass(frozen=True, eq=False)
class Supernet:
    """Weights of the largest architecture and what mixes them.

    shared:  tensors without experts. experts: ``[m, *shape]`` of weight and bias of every linear.
    routers: linear -> (first weight, first bias, last weight, last bias); the last layer's rows are m, or rows x m.
    """

    space: Space
    shared: Mapping[str, Tensor]
    experts: Mapping[str, Tensor]
    routers: Mapping[str, tuple[Tensor, Tensor, Tensor, Tensor]]
    blind: bool = False

    @staticmethod
    def drawn(space: Space, experts: int, routing: str, blind: bool, task: Task) -> Supernet:
        whole = shapes(space, space.largest)
        draws = [drawn(whole, task.generator(1 + 50 * number)) for number in range(experts)]
        linears = [name.removesuffix(".weight") for name, shape in whole.items() if name.endswith("weight")]
        linears = [name for name in linears if len(whole[f"{name}.weight"]) == 2]
        mixed = {f"{name}.{leaf}" for name in linears for leaf in ("weight", "bias")}
        generator, inputs = task.generator(3), len(space.code(space.largest))
        routers = {}
        for name in linears:
            outputs = experts * (whole[f"{name}.weight"][0] if routing == "neuron" else 1)
            first = torch.randn(HIDDEN, inputs, generator=generator) / math.sqrt(inputs)
            last = torch.randn(outputs, HIDDEN, generator=generator) * FIRST_ROUTES
            layers = (first, torch.zeros(HIDDEN), last, torch.zeros(outputs))
            routers[name] = tuple(leaf.requires_grad_() for leaf in layers)
        scale = math.sqrt(experts)
        return Supernet(
            space,
            trained_copy({n: v for n, v in draws[0].items() if n not in mixed}),
            trained_copy({n: torch.stack([d[n] for d in draws]) * scale for n in sorted(mixed)}),
            routers,  # type: ignore[arg-type]
            blind,
        )

    def leaves(self) -> list[Tensor]:
        return [*self.shared.values(), *self.experts.values(), *(leaf for r in self.routers.values() for leaf in r)]

    def routes(self, name: str, code: Tensor) -> Tensor:
        """Shares of the experts of a linear: ``[m]``, or ``[rows of the largest, m]``; they sum to one."""
        first, first_bias, last, last_bias = self.routers[name]
        made = F.linear(F.relu(F.linear(code, first, first_bias)), last, last_bias)
        count = len(self.experts[f"{name}.weight"])
        return (made if len(made) == count else made.view(-1, count)).softmax(-1)

    def folded(self, architecture: Architecture) -> Values:
        """The plain weights of an architecture; gradients reach experts and routers."""
        of = shapes(self.space, architecture)
        code = self.space.code(architecture)
        code = torch.zeros_like(code) if self.blind else code
        found = sliced(self.shared, {n: s for n, s in of.items() if n in self.shared})
        for name in self.routers:
            if f"{name}.weight" not in of:
                continue
            routes = self.routes(name, code)
            for leaf in ("weight", "bias"):
                found[f"{name}.{leaf}"] = mixed(self.experts[f"{name}.{leaf}"], routes, of[f"{name}.{leaf}"])
        return found


def mixed(experts: Tensor, routes: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The leading ``shape`` of experts ``[m, ...]``, mixed by ``routes``: ``[m]``, or of every row ``[rows, m]``."""
    kept = experts[(slice(None), *(slice(0, size) for size in shape))]
    if routes.dim() == 1:
        return torch.tensordot(routes, kept, 1)
    rows = routes[: shape[0]].T  # [m, rows]
    return (kept * rows.view(*rows.shape, *(1,) * (len(shape) - 1))).sum(0)
