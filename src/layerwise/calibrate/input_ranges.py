"""What the inputs of linears span: the smallest and largest value of every channel and at every position.

    x [sequences, length, columns]:    low_c = min over tokens x_tc,    high_c = max over tokens x_tc

Measured by hooks on a network as it runs block by block, padding left out. It is what static grids for inputs
are made of; dynamic ones need none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.calibrate.forward import boundaries, enter_network, forward_block
from layerwise.errors import InputError
from layerwise.network.network import Network, hidden_width
from layerwise.network.streaming import Batch, Streamer, Weights

SAMPLED = 256  # tokens that are kept whole


@dataclass(frozen=True)
class InputRanges:
    """Of one linear's inputs.

    low, high:  each channel's ends, ``[columns]`` float32.
    position_low, position_high: each position's, ``[longest sequence]``; empty where inputs have no positions.
    tokens:     that were seen.
    sample:     some of them, ``[at most 256, columns]``, spread over the batches.
    weight:     the matrix that reads them, ``[rows, columns]``, where it is known.
    """

    low: Tensor
    high: Tensor
    position_low: Tensor
    position_high: Tensor
    tokens: int
    sample: Tensor
    weight: Tensor | None = None

    @staticmethod
    def of(x: Tensor) -> InputRanges:
        """Of tokens ``[tokens, columns]`` without positions."""
        nothing = torch.empty(0)
        step = max(1, len(x) // SAMPLED)
        return InputRanges(x.amin(0), x.amax(0), nothing, nothing, len(x), x[::step][:SAMPLED].clone())


class _Running:
    """Ranges of one linear while batches go through it."""

    def __init__(self, columns: int, length: int, share: int) -> None:
        self.low, self.high = torch.full((columns,), torch.inf), torch.full((columns,), -torch.inf)
        self.position_low, self.position_high = torch.full((length,), torch.inf), torch.full((length,), -torch.inf)
        self.tokens, self.share, self.sample = 0, share, [torch.empty(0, columns)]

    def add(self, x: Tensor, counted: Tensor) -> None:
        """``x`` ``[sequences, length, columns]`` or ``[tokens, columns]``; ``counted`` ``[sequences, length]``."""
        x = x.detach().float().cpu()
        if x.shape[:-1] == counted.shape:
            outside = ~counted[..., None]
            low = x.masked_fill(outside, torch.inf).amin((0, 2))
            high = x.masked_fill(outside, -torch.inf).amax((0, 2))
            length = x.shape[1]
            self.position_low[:length] = torch.minimum(self.position_low[:length], low)
            self.position_high[:length] = torch.maximum(self.position_high[:length], high)
            x = x[counted]
        x = x.reshape(-1, x.shape[-1])
        if not len(x):
            return
        self.low, self.high = torch.minimum(self.low, x.amin(0)), torch.maximum(self.high, x.amax(0))
        self.tokens += len(x)
        self.sample.append(x[:: max(1, len(x) // self.share)][: self.share].clone())

    def ranges(self) -> InputRanges:
        low, high = (torch.where(side.isfinite(), side, 0.0) for side in (self.low, self.high))
        seen = self.position_low.isfinite()
        return InputRanges(
            low, high, self.position_low[seen], self.position_high[seen], self.tokens,
            torch.cat(self.sample)[:SAMPLED],
        )  # fmt: skip


@torch.inference_mode()
def measure_input_ranges(
    network: Network, batches: Sequence[Batch], folder: Path, device: str = "cpu", weights: Weights | None = None
) -> dict[str, InputRanges]:
    """Site -> what its inputs span, of every linear inside a block, with the network's own weights or the given ones.

    folder: scratch space for hidden states; emptied again. Raises ``InputError`` for a network without blocks.
    """
    if network.whole or not network.tree.blocks:
        raise InputError("ranges of inputs are measured block by block, and this network has no blocks")
    own = network.again()
    streamer = Streamer(own, network if weights is None else weights, device, parts=True)
    longest = max(b.tokens.shape[1] for b in batches)
    share = -(-SAMPLED // len(batches))
    running: dict[str, _Running] = {}
    first, second = boundaries(folder, "input-ranges", batches, hidden_width(network), 2)
    enter_network(streamer, batches, first)
    for index, part in enumerate(own.parts):
        sites = [s for path in part for s in own.tree.of_block(path) if s.kind == "linear" and s.kernel is None]
        current: list[Tensor] = []
        handles = []
        for site in sites:
            running[site.name] = _Running(site.columns, longest, share)
            handles.append(
                own.module.get_submodule(site.name).register_forward_pre_hook(_note(running, site.name, current))
            )

        def now(i: int, _: nn.Module, current: list[Tensor] = current) -> None:
            current[:] = [batches[i].counted]

        try:
            forward_block(streamer, index, batches, first, second, now)
        finally:
            for handle in handles:
                handle.remove()
        first, second = second, first
    first.remove()
    second.remove()
    return {name: found.ranges() for name, found in running.items()}


def _note(running: dict[str, _Running], name: str, current: list[Tensor]) -> Any:
    def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
        if current:  # not while the first block's output shape is being learnt
            running[name].add(given[0], current[0])

    return hook
