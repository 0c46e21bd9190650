"""A network whole in memory, run block by block in any order: for measurements that try many orders of its blocks.

    call = stack.enter(batch)        hidden state before the first block, and how each block is called (masks, rotary)
    h = stack.run(i, h, call)        block i
    out = stack.leave(batch, h)      what comes after the blocks: final norm, head or pooler

Weights are float32 and all of them are in memory, which the passes of calibration avoid: whoever tries every pair of
blocks would otherwise read each block from disk dozens of times.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.network.arranged import in_memory
from layerwise.network.arrangement import Arrangement, Step
from layerwise.network.network import Network
from layerwise.network.stand_in import Passing
from layerwise.network.streaming import Batch

Run = Callable[[int, Tensor], Tensor]
"""``run(block, hidden) -> hidden``."""


@dataclass(frozen=True)
class Entered:
    """What happens before the first block of one batch: hidden state ``[sequences, length, width]`` and calls."""

    hidden: Tensor
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]


class Stack:
    """All blocks of a network in memory, as float32."""

    def __init__(self, network: Network, device: str = "cpu") -> None:
        if network.depths is not None:
            raise InputError(f"{network.name} runs blocks for some inputs only; measure the network it was made from")
        if network.arrangement is not None:
            raise InputError(f"{network.name} is arranged already; measure the network that it was made from")
        if network.whole:
            raise InputError("a module in memory has no blocks that could be run in another order; open a checkpoint")
        self.module = in_memory(network).to(device)
        self.device = torch.device(device)
        self.place = network.tree.blocks[0].rpartition(".")[0]
        self.values = -1  # how many a block returns, where it returns a tuple; 0 where it returns a tensor
        self.blocks = [self.module.get_submodule(path) for path in network.tree.blocks]

    def enter(self, batch: Batch) -> Entered:
        if self.values < 0:
            with self.blocks[0].register_forward_hook(self._learn):
                self.module(**self._arguments(batch.rows(0, 1)))
        seen = [Passing(block, self.values) for block in self.blocks]
        with self._replaced(seen):
            self.module(**self._arguments(batch))
        return Entered(seen[0].hidden, tuple(noted.call for noted in seen))

    def _learn(self, block: nn.Module, given: Any, output: Any) -> None:
        self.values = len(output) if isinstance(output, tuple) else 0

    def run(self, index: int, hidden: Tensor, entered: Entered) -> Tensor:
        args, kwargs = entered.calls[index]
        out = self.blocks[index](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def leave(self, batch: Batch, hidden: Tensor) -> Any:
        """The network's output object when ``hidden`` is what the last block gives."""
        with self._replaced([Passing(b, self.values, hidden if i == 0 else None) for i, b in enumerate(self.blocks)]):
            return self.module(**self._arguments(batch))

    def states(self, entered: Entered) -> list[Tensor]:
        """The network's own hidden states at all boundaries: before the first block and after each."""
        found = [entered.hidden]
        for index in range(len(self.blocks)):
            found.append(self.run(index, found[-1], entered))
        return found

    def arrange(self, arrangement: Arrangement, hidden: Tensor, entered: Entered) -> Tensor:
        """What the blocks give when they run as an arrangement without extras says."""
        for step in arrangement.steps:
            hidden = self.step(step, hidden, entered)
        return hidden

    def step(self, step: Step, hidden: Tensor, entered: Entered) -> Tensor:
        """One step of an arrangement."""
        return run_step(step, hidden, lambda index, h: self.run(index, h, entered))

    def _arguments(self, batch: Batch) -> dict[str, Any]:
        given = {name: value.to(self.device) for name, value in batch.arguments().items()}
        return given if batch.pixels is not None else {**given, "use_cache": False}

    @contextlib.contextmanager
    def _replaced(self, others: Sequence[nn.Module]) -> Iterator[None]:
        own = self.module.get_submodule(self.place)
        self.module.set_submodule(self.place, nn.ModuleList(others))
        try:
            yield
        finally:
            self.module.set_submodule(self.place, own)


def run_step(step: Step, hidden: Tensor, run: Run) -> Tensor:
    """One step: a block, or several on the same hidden state, combined as ``arrangement.py`` says."""
    if len(step.blocks) == 1:
        return run(step.blocks[0], hidden)
    states = [hidden] * len(step.blocks)
    for _ in range(step.rounds):
        added = torch.stack([run(i, h) - h for i, h in zip(step.blocks, states, strict=True)])
        reached = hidden + added.cumsum(0)
        states = [hidden, *reached[:-1]]
    return hidden + added.mean(0) if step.combine == "mean" else reached[-1]
