"""Where a factor may be moved from keys to queries past a rotary embedding without changing the function.

Rotary position turns the channels (i, j) of every head by an angle, j = i + d/2 (halves) or j = i + 1 (interleaved).
A factor that both channels share commutes with the turning, so

    k_i, k_j <- k_i / c, k_j / c,      q_i, q_j <- q_i c, q_j c,      q . k after rotation is what it was

with the same c for all query heads that read one key head. A factor that the two do not share changes the scores. Both
are tried out with random factors, and pairs are kept if the first leaves the block's output and the second does not:
names say nothing about which channels are turned together, about norms in between, or whether anything is turned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.network.sites import is_linear, is_transposed
from layerwise.network.skeleton import materialised


@dataclass(frozen=True)
class RotaryPairs:
    """Queries and keys of one attention, by path in the block.

    heads: key heads; width: channels of a head; interleaved: whether (2i, 2i + 1) are a pair, not (i, i + width/2).
    """

    queries: str
    keys: str
    heads: int
    width: int
    interleaved: bool

    def over_channels(self, pairs: Tensor) -> Tensor:
        """A value for each pair ``[heads, width/2]`` as one for each key channel ``[heads * width]``."""
        spread = pairs.repeat_interleave(2, 1) if self.interleaved else torch.cat([pairs, pairs], 1)
        return spread.reshape(-1)

    def over_pairs(self, channels: Tensor) -> Tensor:
        """Sums of the two channels of every pair: ``[heads * width]`` -> ``[heads, width/2]``."""
        heads = channels.view(self.heads, self.width)
        if self.interleaved:
            return heads[:, 0::2] + heads[:, 1::2]
        return heads[:, : self.width // 2] + heads[:, self.width // 2 :]

    def over_queries(self, channels: Tensor, rows: int) -> Tensor:
        """A value for each key channel as one for each of ``rows`` query channels."""
        return channels.view(self.heads, self.width).repeat_interleave(rows // len(channels), 0).reshape(-1)


def find_rotary_pairs(
    block: nn.Module, run: Callable[[nn.Module], Tensor], hidden: Tensor, seed: int, tolerance: float
) -> tuple[RotaryPairs, ...]:
    """The rotary attentions of a materialised block; ``tolerance`` as a share of what the block adds to ``hidden``."""
    inputs: dict[str, Tensor] = {}

    def note(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
            inputs[path] = given[0]

        return hook

    handles = [m.register_forward_pre_hook(note(p)) for p, m in block.named_modules() if is_linear(m)]
    try:
        reference = run(block)
    finally:
        for handle in handles:
            handle.remove()
    allowed = tolerance * float((reference - hidden).norm())
    generator = torch.Generator().manual_seed(seed)

    def moved(pairs: RotaryPairs, channels: Tensor) -> float:
        with materialised(block, scaled_rows(block, pairs, channels.to(hidden.device))):
            return float((run(block) - reference).norm())

    found: list[RotaryPairs] = []
    for pairs in _candidates(block, inputs):
        factor = torch.rand(pairs.heads, pairs.width // 2, generator=generator) * 1.5 + 0.5
        alone = torch.rand(pairs.heads * pairs.width, generator=generator) * 1.5 + 0.5
        taken = any(f.queries == pairs.queries or f.keys == pairs.keys for f in found)
        if not taken and moved(pairs, pairs.over_channels(factor)) <= allowed < moved(pairs, alone):
            found.append(pairs)
    return tuple(found)


def _candidates(block: nn.Module, inputs: dict[str, Tensor]) -> Iterator[RotaryPairs]:
    """Two linears of one parent that read the same tensor, the first as many rows as the second or a multiple."""
    for queries, given in inputs.items():
        parent = block.get_submodule(queries.rpartition(".")[0])
        width = getattr(parent, "head_dim", None)
        if not isinstance(width, int) or width < 2 or width % 2:
            continue
        for keys, other in inputs.items():
            if keys == queries or other.data_ptr() != given.data_ptr() or other.shape != given.shape:
                continue
            rows, mine = rows_of(block, keys), rows_of(block, queries)
            if rows % width == 0 and mine % rows == 0 and queries.rpartition(".")[0] == keys.rpartition(".")[0]:
                for interleaved in (False, True):
                    yield RotaryPairs(queries, keys, rows // width, width, interleaved)


def rows_of(block: nn.Module, path: str) -> int:
    member = block.get_submodule(path)
    weight = block.get_parameter(f"{path}.weight")
    return weight.shape[1] if is_transposed(member) else weight.shape[0]


def scaled_rows(block: nn.Module, pairs: RotaryPairs, channels: Tensor) -> dict[str, Tensor]:
    """Parameters of the block with keys divided by ``channels`` ``[key rows]`` and queries multiplied."""
    queries = pairs.over_queries(channels, rows_of(block, pairs.queries))
    parameters = {n: p.data for n, p in block.named_parameters()}
    out: dict[str, Tensor] = {}
    for path, factor in ((pairs.keys, 1 / channels), (pairs.queries, queries)):
        transposed = is_transposed(block.get_submodule(path))
        out |= with_rows_scaled(parameters, path, factor, transposed)
    return out


def with_rows_scaled(
    parameters: dict[str, Tensor], path: str, factor: Tensor, transposed: bool = False
) -> dict[str, Tensor]:
    """The weight, and the bias if there is one, of a linear whose outputs are multiplied by ``factor``."""
    name, bias = f"{path}.weight", f"{path}.bias"
    out = {name: parameters[name] * (factor if transposed else factor[:, None])}
    if bias in parameters:
        out[bias] = parameters[bias] * factor
    return out
