"""The forward pass: block by block, only block inputs kept, on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from layerwise.calibrate.activations import Boundary
from layerwise.engine.memory import give_back
from layerwise.network.streaming import Batch, Streamer


def boundaries(folder: Path, prefix: str, batches: Sequence[Batch], width: int, count: int) -> list[Boundary]:
    """``count`` boundaries for hidden states of ``width``."""
    shapes = [(*b.tokens.shape, width) for b in batches]
    return [Boundary(folder / f"{prefix}-{i:04d}.bin", shapes) for i in range(count)]


@torch.inference_mode()
def enter_network(streamer: Streamer, batches: Sequence[Batch], out: Boundary) -> None:
    """Write the first block's inputs."""
    with streamer.head_of_network() as enter:
        out.write(enter(batch, 0)[0] for batch in batches)


@torch.inference_mode()
def learn_output_shape(streamer: Streamer, batch: Batch, hidden: Boundary) -> None:
    """Learn from one sequence whether blocks return tuples; until then only the first block can be entered.

    hidden: any boundary of the network: what a block returns does not depend on what it is given.
    """
    if streamer.tuple_length is None:
        with streamer.block(0) as first, streamer.head_of_network() as enter:
            streamer.run_block(first, hidden.read(0)[:1].to(streamer.device), enter(batch.rows(0, 1), 0)[1])


@torch.inference_mode()
def forward_block(
    streamer: Streamer,
    index: int,
    batches: Sequence[Batch],
    inputs: Boundary,
    outputs: Boundary,
    watch: Callable[[int, torch.nn.Module], None] | None = None,
) -> None:
    """Run one block over every batch. ``watch(batch, block)`` is called before each batch, to place hooks."""

    def run() -> Iterator[Tensor]:
        if batches:
            learn_output_shape(streamer, batches[0], inputs)
        with streamer.block(index) as block, streamer.head_of_network() as enter:
            for i, batch in enumerate(batches):
                if watch is not None:
                    watch(i, block)
                call = enter(batch, index)[1]
                yield streamer.run_block(block, inputs.read(i).to(streamer.device), call)

    outputs.write(run())
    give_back()


def forward_to(
    streamer: Streamer,
    index: int,
    batches: Sequence[Batch],
    hidden: Sequence[Boundary],
    runs: Callable[[int], bool] = lambda _: True,
) -> None:
    """Make sure that the hidden states in front of block ``index`` are there, from the last that are; these go.

    hidden: the states in front of every block.
    runs:   whether a block runs; one that does not hands on what it was given.
    """
    if hidden[index].complete:
        return
    if index == 0:
        enter_network(streamer, batches, hidden[0])
        return
    forward_to(streamer, index - 1, batches, hidden, runs)
    before, after = hidden[index - 1], hidden[index]
    if runs(index - 1):
        forward_block(streamer, index - 1, batches, before, after)
    else:
        after.write(before.read(i) for i in range(len(batches)))
    before.remove()
