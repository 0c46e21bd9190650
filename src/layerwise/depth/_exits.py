"""What surgeons share that let whole texts leave early: a network in memory whose every block can be the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from layerwise.depth._training import parts_of, train
from layerwise.errors import InputError
from layerwise.network.adaptive import over_rms, pooled
from layerwise.network.network import output_width
from layerwise.network.stack import Stack
from layerwise.network.streaming import Batch

if TYPE_CHECKING:
    from layerwise.calibrate.passes import Calibration
    from layerwise.network.network import Network

Shares = Callable[[list[Tensor]], Tensor]


class Exits:
    """A network's blocks, trained so that what follows the blocks reads every one of them.

    The parts of the fit split are trained on, those of the judge split decide. Tables, norms and heads outside the
    blocks stay as they are: what follows the blocks is one and the same for all exits.
    """

    def __init__(self, asked: object, network: Network, calibration: Calibration, sequences: int) -> None:
        if calibration.loss.kind == "token kl":
            raise InputError(
                f"{asked} gives each text a depth of its own, for classifiers and encoders; "
                f"{network.name} says something at every token: gamma_mod or layer_skip are for such networks"
            )
        self.loss, self.network, self.seed = calibration.loss, network, calibration.seed
        self.stack = Stack(network, calibration.device)
        self.count = len(self.stack.blocks)
        if self.count < 2:
            raise InputError(f"{asked} needs two blocks or more, and {network.name} has one")
        width = output_width(network)
        self.fit, self.judge = (
            parts_of(split, sequences, width) for split in (calibration.splits.fit, calibration.splits.judge)
        )
        self.wanted = {id(part): self.full(part) for part in (*self.fit, *self.judge)}
        self.own = {
            f"{path}.{name}": parameter
            for path, block in zip(network.tree.blocks, self.stack.blocks, strict=True)
            for name, parameter in block.named_parameters()
        }

    @torch.no_grad()
    def full(self, part: Batch) -> Tensor:
        """What the network gives as it is."""
        states = self.stack.states(self.stack.enter(part))
        return self.loss.target(self.stack.leave(part, states[-1]), part).clone()

    def states(self, part: Batch) -> list[Tensor]:
        """Behind each block [texts, T, d]."""
        return self.stack.states(self.stack.enter(part))[1:]

    def distances(self, part: Batch, states: Sequence[Tensor], exits: Sequence[int] | None = None) -> Tensor:
        """Loss of every text at every exit, to the network as it was [exits, texts]."""
        chosen = range(len(states)) if exits is None else exits
        outputs = [self.loss.target(self.stack.leave(part, states[i]), part) for i in chosen]
        return torch.stack([self.loss.distances(self.wanted[id(part)], output) for output in outputs])

    def read(self, part: Batch, state: Tensor) -> Tensor:
        """What a head reads of a state: the mean over a text's tokens, over its rms [texts, d]."""
        return over_rms(pooled(state.float(), None if part.mask is None else part.mask.to(state.device)))

    def train(
        self, loss: Callable[[Batch, list[Tensor]], Tensor], head: nn.Module | None, steps: int, rate: float, seed: int,
        advance: Callable[[], None],
    ) -> None:  # fmt: skip
        """Lower ``loss(part, states)`` in the blocks and in a head; the least on the judge split is kept."""

        def judged() -> float:
            with torch.no_grad():
                return sum(float(loss(part, self.states(part))) * len(part.tokens) for part in self.judge) / sum(
                    len(part.tokens) for part in self.judge
                )

        train(
            [*self.own.values(), *(head.parameters() if head is not None else ())],
            lambda _step, part: loss(self.fit[part], self.states(self.fit[part])),
            judged, steps, rate, len(self.fit), seed, advance,
        )  # fmt: skip

    def values(self, head: nn.Module) -> dict[str, Tensor]:
        """Parameters of the trained blocks, and of the head where it is kept."""
        place = f"{self.network.tree.blocks[0]}.depth"
        found = {f"{place}.{name}": p for name, p in head.named_parameters()} | self.own
        return {name: p.detach().float().cpu().clone() for name, p in found.items()}


def new_head(read: int, inner: int, said: int, seed: int, bias: float = 0.0) -> nn.Module:
    """A head of ``network/adaptive.py``: said = outer tanh(inner read)."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Module()
    for name, rows, columns, shift in (("inner", inner, read, 0.0), ("outer", said, inner, bias)):
        part = nn.Module()
        drawn = torch.randn(rows, columns, generator=generator) / columns**0.5
        part.register_parameter("weight", nn.Parameter(drawn, requires_grad=False))
        part.register_parameter("bias", nn.Parameter(torch.full((rows,), shift), requires_grad=False))
        head.add_module(name, part)
    return head
