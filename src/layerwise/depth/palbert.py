"""PALBERT: a text leaves behind the block at which it is as likely as not that no further block is needed.

    lambda_i = sigmoid(head([s_i + e_i ; s_{i-1} + e_{i-1}]))                     i = 1 … L-1
    p_i = lambda_i prod_{j<i} (1 - lambda_j),   p_L = prod_{j<L} (1 - lambda_j);   F_i = p_1 + … + p_i
    L   = sum_i p_i d_i + beta KL(g || p),      g_i = a (1 - a)^{i-1}, g_L = (1 - a)^{L-1}
    Q-exit: a text leaves behind the first block with F_i >= q

s_i is the mean state of a text's tokens behind block i over its rms, e_i a hundredth of the sinusoidal code of i. The
rule is deterministic, where PonderNet draws the exit from p: the same text leaves at the same block, with less spread.
d_i is the loss at exit i through the network's own norm, pooler and classifier. The result is a checkpoint that plain
transformers loads after ``import layerwise`` (``network/adaptive.py``); q stands in its config and can be changed.

Source: "PALBERT: Teaching ALBERT to Ponder", arXiv 2204.03276 (released code). Choices of ours: d_i is the loss to what
the network said before (calibration text has no labels), so that a trained classifier or encoder is made adaptive, not
trained; blocks and head are trained, what follows the blocks is not; one hidden layer in the head. ``previous=false``
takes the state of the block before away from the head: the ablation of the paper's head.

Measured on a small classifier of six blocks that learned from labels (40 % of held-out texts wrong), 50 steps on 300
other texts, two seeds: 2.4 blocks a text. KL to the network as it came 0.0037; exits drawn from p 0.0046 in 2.9 blocks;
the first two blocks as they came 0.0076; without the state before 0.0039. But the same depths handed to other texts
give 0.0036: that trained exits are worth something is seen, that this classifier's texts need different depths is not,
and all but the first blocks' difference are within the spread over the seeds (0.0026).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from layerwise.roles import NetworkSurgeon
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.passes import Calibration
    from layerwise.depth._exits import Exits
    from layerwise.engine.progress import Progress
    from layerwise.network.network import Network
    from layerwise.network.streaming import Batch

INNER = 32  # width of the head's hidden layer


@technique(
    paper="PALBERT",
    menu=("q=0.5",),
    left_out="training on labels, and GLUE: exits learn what the whole network says",
)
class Palbert(NetworkSurgeon):
    """Texts leave once the chance that no more blocks are needed passes q."""

    by_text: ClassVar[bool] = True
    rivals: ClassVar[tuple[str, ...]] = ("palbert:previous=false",)

    q: float = option(0.5, minimum=0.0, maximum=1.0, help="a text leaves once this much of its exits lies behind it")
    prior: float = option(0.3, minimum=0.001, maximum=0.999, help="a: chance of leaving at each block, beforehand")
    beta: float = option(0.5, minimum=0.0, maximum=1000.0, help="weight of the prior")
    previous: bool = option(True, help="show the head the state behind the block before, too")
    steps: int = option(50, minimum=0, help="training steps")
    rate: float = option(3e-4, minimum=0.0, maximum=1.0, help="learning rate of Adam, falling to zero")
    sequences: int = option(8, minimum=1, maximum=4096, help="texts a step")
    seed: int = option(0, minimum=0, help="of the head and of the order of training")

    def operate(self, network: Network, calibration: Calibration, progress: Progress) -> Network:
        from layerwise.depth._exits import Exits, new_head
        from layerwise.network.adaptive import adapted
        from layerwise.network.depths import Depths

        exits = Exits(self, network, calibration, self.sequences)
        head = new_head(2 * calibration.width, INNER, 1, self.seed, -2.0)

        def loss(part: Batch, states: list[Tensor]) -> Tensor:
            chances = self.chances(exits, head, part, states)
            apart = (chances * exits.distances(part, states)).sum(0).mean()
            return apart + self.beta * divergence(chances, self.prior).mean()

        with progress.stage("train exits", max(1, self.steps)) as advance:
            exits.train(loss, head, self.steps, self.rate, self.seed, advance)
        values = exits.values(head)
        if not self.previous:
            values[f"{network.tree.blocks[0]}.depth.inner.weight"][:, calibration.width :] = 0
        return adapted(network, Depths("exit", threshold=float(self.q), inner=INNER), values)

    def chances(self, exits: Exits, head: object, part: Batch, states: list[Tensor]) -> Tensor:
        """p [blocks, texts]."""
        import torch

        from layerwise.network.adaptive import exit_chance

        read = [exits.read(part, state) for state in states]
        before = [torch.zeros_like(read[0]), *read]
        if not self.previous:
            before = [torch.zeros_like(read[0])] * len(before)
            head = _Half(head, read[0].shape[-1])
        return spread([exit_chance(head, read[i], before[i], i) for i in range(len(read) - 1)])


class _Half:
    """A head without the half that reads the block before."""

    def __init__(self, head: object, width: int) -> None:
        import torch

        inner = head.inner  # type: ignore[attr-defined]
        seen = torch.cat([inner.weight[:, :width], torch.zeros_like(inner.weight[:, width:])], 1)
        self.inner, self.outer = _Values(seen, inner.bias), head.outer  # type: ignore[attr-defined]


class _Values:
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias


def spread(leaving: list[Tensor]) -> Tensor:
    """p [L, texts] from lambda of the first L - 1 blocks; it adds up to 1."""
    import torch

    left = torch.ones_like(leaving[0])
    found = []
    for chance in leaving:
        found.append(left * chance)
        left = left * (1 - chance)
    return torch.stack([*found, left])


def divergence(chances: Tensor, prior: float) -> Tensor:
    """KL(g || p) of every text, g the geometric prior cut off at the last block."""
    import torch

    blocks = len(chances)
    g = prior * (1 - prior) ** torch.arange(blocks, dtype=chances.dtype)
    g[-1] = (1 - prior) ** (blocks - 1)
    return (g[:, None] * (g[:, None].log() - chances.clamp(min=1e-8).log())).sum(0)
