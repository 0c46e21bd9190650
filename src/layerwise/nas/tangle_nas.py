r"""TangleNAS: gradient search in an entangled space, by mixing slices of the weights instead of outputs.

    W(p) = sum_j p_j pad(W[:c_j, :d_j])          one forward pass, however many choices there are

Row r of a tensor whose rows alone are chosen is scaled by ``P(c > r) = sum_{j: c_j > r} p_j``, a staircase. Where
two choices meet (the inner width is width times ratio) the weights are the outer product of their probabilities. Depth
is mixed in the stream: ``x = sum_d p_d x_(after block d)``. Probabilities come from logits a by one of

    darts   softmax(a)          gdas   a hard draw, straight through          drnas   a draw of Dirichlet(elu(a) + 1)

Bilevel: a step of the weights on training images, then a step of the logits on validation images. Mixing is exact for a
linear layer: the mixed weights give the mixed outputs. Behind it, layer norms weigh channel r by ``P(width > r)``, so
that a channel that is off is as good as absent: one-hot probabilities give exactly the sliced network.

    loss of the logits = cross-entropy + price * max(0, E_p[parameters] / limit - 1)

At the end the most probable architecture within the limit is cut out, weights and all, and trained on.

Source: R. Sukthanker et al., "Weight-Entanglement Meets Gradient-Based Neural Architecture Search", arXiv 2312.10440.
Choices of ours: the weighted norms; the price, without which the largest always wins; the logits rest while the weights
warm up; their rate, since a small budget has few steps.

Measured on 10,000 MNIST images (evidence row): at a budget of 300 steps it loses to random search (1.2 times the
cross-entropy), and to itself with even logits, whose tie falls to the smallest network, which trains for most
steps. Logits that learn from validation images do slightly better than logits that learn from training images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.nas._space import Architecture, Shapes, Space, block_shapes, macs, parameters, shapes
from layerwise.nas.network import Loose, Shape, Values, block, drawn, enter, leave, sliced
from layerwise.nas.task import Found, Meter, Task, draw, finish, train, trained_copy
from layerwise.roles import Search
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from collections.abc import Sequence

WARM = 0.2  # share of the search in which the logits rest


@technique(
    paper="TangleNAS",
    left_out="its AutoFormer, OFA and language-model spaces, kernel sizes, and data sets beyond small images",
)
class TangleNas(Search):
    """One supernet whose weights are mixtures of slices; the mixture's logits are trained on validation images."""

    rivals = ("random_search", "tangle_nas:learn=none", "tangle_nas:learn=train")

    estimator: str = option("drnas", choices=("darts", "gdas", "drnas"), help="how logits become probabilities")
    learn: str = option(
        "valid", choices=("valid", "train", "none"), help="images that the logits learn from; none: they stay even"
    )
    choice_rate: float = option(0.05, minimum=0.0, maximum=1.0, help="rate of the logits")
    price: float = option(1.0, minimum=0.0, maximum=100.0, help="of the expected parameters above the limit")
    search: float = option(0.5, minimum=0.0, maximum=0.8, help="share of the budget that the supernet takes")

    def search_in(self, task: Task) -> Found:
        space, meter, generator = task.space, Meter(task), task.generator(2)
        masks = Masks.of(space)
        values = trained_copy(drawn(shapes(space, space.largest), task.generator(1)))
        logits = [torch.zeros(shape, requires_grad=True) for shape in logit_shapes(space)]
        adam = torch.optim.Adam(logits, lr=self.choice_rate, betas=(0.5, 0.999), foreach=False)
        images = task.valid if self.learn == "valid" else task.train
        cost = macs(space, space.largest)

        def loss_on(part: object, odds: Sequence[Tensor]) -> Tensor:
            batch = draw(part, task.batch, generator)  # type: ignore[arg-type]
            return F.cross_entropy(mixed_forward(values, masks, odds, batch.pixels), batch.labels)

        def step(share: float) -> tuple[Tensor, int]:
            passes = 1
            if share >= WARM and self.learn != "none":
                odds = probabilities(logits, self.estimator, generator)
                loss = loss_on(images, odds)
                above = torch.relu(masks.expected(odds) / task.most - 1)
                gradients = torch.autograd.grad(loss + self.price * above, logits)
                for leaf, gradient in zip(logits, gradients, strict=True):
                    leaf.grad = gradient
                adam.step()
                passes = 2
            with torch.no_grad():
                odds = probabilities(logits, self.estimator, generator)
            return loss_on(task.train, odds), passes * cost

        train(meter, values.values(), self.search, step)
        with torch.no_grad():
            likely = [mean_odds(leaf, self.estimator) for leaf in logits]
        best = max(task.fitting, key=lambda a: log_odds(space, likely, a))
        seen = [(f"width {w}", float(p)) for w, p in zip(space.widths, likely[0], strict=True)]
        seen += [(f"depth {d}", float(p)) for d, p in zip(space.depths, likely[1], strict=True)]
        return finish(meter, Shape((best,)), [sliced(values, shapes(space, best))], seen)


def logit_shapes(space: Space) -> list[tuple[int, ...]]:
    """Of the width, the depth, and the ratio of every block."""
    return [(len(space.widths),), (len(space.depths),), (space.depths[-1], len(space.ratios))]


def probabilities(logits: Sequence[Tensor], estimator: str, generator: torch.Generator) -> list[Tensor]:
    """Rows that sum to one; gradients reach the logits."""
    return [_draw(leaf, estimator, generator) for leaf in logits]


def _draw(logits: Tensor, estimator: str, generator: torch.Generator) -> Tensor:
    if estimator == "darts":
        return logits.softmax(-1)
    if estimator == "gdas":
        noise = -torch.log(-torch.log(torch.rand(logits.shape, generator=generator).clamp(1e-9, 1 - 1e-7)))
        soft = (logits + noise).softmax(-1)
        hard = F.one_hot(soft.argmax(-1), logits.shape[-1]).to(soft)
        return hard + (soft - soft.detach())
    with torch.random.fork_rng(devices=[]):  # the distribution knows no generator
        torch.manual_seed(int(torch.randint(0, 2**31, (1,), generator=generator)))
        found: Tensor = torch.distributions.Dirichlet(F.elu(logits) + 1 + 1e-4).rsample()
    return found


def mean_odds(logits: Tensor, estimator: str) -> Tensor:
    if estimator != "drnas":
        return logits.softmax(-1)
    concentration = F.elu(logits) + 1 + 1e-4
    return concentration / concentration.sum(-1, keepdim=True)


def log_odds(space: Space, odds: Sequence[Tensor], architecture: Architecture) -> float:
    """Log probability of an architecture; a tie goes to the first, which is the smallest."""
    width, depth, ratios = odds
    found = width[space.widths.index(architecture.width)].log() + depth[space.depths.index(architecture.depth)].log()
    for index, ratio in enumerate(architecture.ratios):
        found = found + ratios[index, space.ratios.index(ratio)].log()
    return float(found)


@dataclass(frozen=True, eq=False)
class Masks:
    """For every tensor which of its values each choice has: ``[widths, values]``, or ``[widths, ratios, values]``.

    sizes: parameters outside blocks ``[widths]`` and of a block ``[widths, ratios]``.
    """

    space: Space
    of_tensor: Mapping[str, Tensor]
    sizes: tuple[Tensor, Tensor]

    @staticmethod
    def of(space: Space) -> Masks:
        whole = shapes(space, space.largest)
        by_choice: dict[str, list[Tensor]] = {name: [] for name in whole}
        outside, inside = [], []
        for width in space.widths:
            for ratio in space.ratios:
                part = shapes(space, Architecture(width, (ratio,) * space.depths[-1]))
                for name, shape in part.items():
                    mask = torch.zeros(whole[name])
                    mask[tuple(slice(0, size) for size in shape)] = 1.0
                    by_choice[name].append(mask.flatten())
                inside.append(_count(block_shapes(0, width, ratio)))
            one = Architecture(width, (space.ratios[0],))
            outside.append(parameters(space, one) - _count(block_shapes(0, width, space.ratios[0])))
        table = (len(space.widths), len(space.ratios))
        stacked = {name: torch.stack(masks).view(*table, -1) for name, masks in by_choice.items()}
        kept = {n: m if ".up." in n or ".down." in n else m[:, 0].contiguous() for n, m in stacked.items()}
        return Masks(space, kept, (torch.tensor(outside).float(), torch.tensor(inside).float().view(table)))

    def mix(self, values: Mapping[str, Tensor], odds: Sequence[Tensor]) -> Values:
        """``W(p)`` of every tensor."""
        width, _, ratios = odds
        found = {}
        for name, value in values.items():
            mask = self.of_tensor[name]
            if mask.dim() == 2:
                scale = width @ mask
            else:
                both = width[:, None] * ratios[int(name.split(".")[1])]
                scale = both.flatten() @ mask.flatten(0, 1)
            found[name] = value * scale.view(value.shape)
        return found

    def expected(self, odds: Sequence[Tensor]) -> Tensor:
        """Expected number of parameters."""
        width, _, ratios = odds
        outside, inside = self.sizes
        per_block = torch.einsum("j,ik,jk->i", width, ratios, inside)
        return width @ outside + (survival(self.space, odds) * per_block).sum()


def survival(space: Space, odds: Sequence[Tensor]) -> Tensor:
    """``P(depth > i)`` for every block i."""
    return torch.stack([odds[1][[d > i for d in space.depths]].sum() for i in range(space.depths[-1])])


def _count(of: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in of.values())


def mixed_forward(values: Mapping[str, Tensor], masks: Masks, odds: Sequence[Tensor], pixels: Tensor) -> Tensor:
    """Class scores of the mixture."""
    space = masks.space
    share = odds[0] @ masks.of_tensor["norm.weight"]  # P(width > channel)
    parts = Loose(masks.mix(values, odds), share)
    x = enter(parts, space, pixels)
    out = torch.zeros_like(x)
    for index in range(space.depths[-1]):
        x = block(parts, index, x)
        if index + 1 in space.depths:
            out = out + odds[1][space.depths.index(index + 1)] * x
    return leave(parts, out)
