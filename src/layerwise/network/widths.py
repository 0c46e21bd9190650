"""Which slices of which parameters are one attention head or one channel of an MLP, and the network without some.

    channels:  up[j, :], up bias j, gate[j, :] | down[:, j]             j a channel between the matrices of an MLP
    heads:     rows of q for g heads, rows of k and v for one | columns of o     a key-value head with its g queries

Nothing is read off the names of modules: the class is built once more with one unit less in its config, and what then
has another shape, along which axis, is what a unit consists of. Every block loses the same number of units, so that the
config stays one that the plain class loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import InputError
from layerwise.network.basis_heads import head_size
from layerwise.network.network import Change, Network
from layerwise.network.skeleton import build_on_meta

INNER = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim", "d_ff")  # what configs call the width of an MLP


@dataclass(frozen=True)
class Width:
    """A width that can be cut.

    kind:   "heads" or "channels".
    units:  how many a block has. Along an axis each is a run of ``length / units`` entries, in order.
    config: name in config.json -> its value for each unit, or for all where it does not change.
    slices: block -> parameter -> the axis along which units lie.
    readers: block -> the linear whose inputs are the units (the output projection, the second matrix of the MLP).
    """

    kind: str
    units: int
    config: Mapping[str, tuple[int, bool]]
    slices: Mapping[str, Mapping[str, int]]
    readers: Mapping[str, str]

    def entries(self, units: Tensor, length: int) -> Tensor:
        """The entries of an axis of this length that belong to ``units`` (sorted)."""
        size = length // self.units
        return (units[:, None] * size + torch.arange(size)).reshape(-1)

    def sums(self, values: Tensor) -> Tensor:
        """Sum over each unit of what belongs to entries of an axis: ``[..., length]`` -> ``[..., units]``."""
        return values.unflatten(-1, (self.units, -1)).sum(-1)

    def removed(self, share: float) -> int:
        """How many units a share of them is; never all."""
        return min(int(share * self.units + 0.5), self.units - 1)

    def config_without(self, removed: int) -> dict[str, int]:
        left = self.units - removed
        return {name: value * left if each else value for name, (value, each) in self.config.items()}


def channels_of(network: Network) -> Width:
    """The channels of the MLPs. Raises ``InputError`` where a block has none that can be cut alike."""
    config: Any = network.module.config
    for key in INNER:
        if not hasattr(config, key):
            continue
        count = getattr(config, key) or 4 * config.hidden_size
        return _width(network, "channels", count, {key: (1, True)}, {count})
    raise InputError(f"{network.architecture} does not take the width of its MLPs from its config ({', '.join(INNER)})")


def heads_of(network: Network) -> Width:
    """Key-value heads with the queries that read them. Raises ``InputError`` where they cannot be cut."""
    config: Any = network.module.config
    queries = getattr(config, "num_attention_heads", None)
    size = head_size(network.module, network.module.get_submodule(network.tree.blocks[0]))
    if not isinstance(queries, int) or size is None:
        raise InputError(f"{network.architecture} does not say in its config how many attention heads it has")
    names = getattr(type(config), "attribute_map", {})
    values = getattr(config, "num_key_value_heads", None)
    units = values if isinstance(values, int) else queries
    entries = {names.get("num_attention_heads", "num_attention_heads"): (queries // units, True)}
    if isinstance(values, int):
        entries[names.get("num_key_value_heads", "num_key_value_heads")] = (1, True)
    entries["head_dim"] = (size, False)
    return _width(network, "heads", units, entries, {queries * size, units * size, queries, units})


def _width(network: Network, kind: str, units: int, config: Mapping[str, tuple[int, bool]], lengths: set[int]) -> Width:
    """The slices of a width, by building the class with one unit less.

    lengths: that an axis of units may have; another one lays them out in a way that is not known here.
    """
    what = f"{kind} of {network.architecture} cannot be cut"
    if units < 2:
        raise InputError(f"{what}: there is one a block")
    if any(site.experts for site in network.tree.sites):
        raise InputError(f"{what}: its blocks hold experts")
    less = Width(kind, units, config, {}, {}).config_without(1)
    try:
        smaller = build_on_meta(network.architecture, {**network.checkpoint.config, **less})
    except InputError as reason:
        raise InputError(f"{what}: its class builds none with one less ({reason})") from None
    shapes = {name: tuple(p.shape) for name, p in smaller.named_parameters(remove_duplicate=False)}
    slices: dict[str, dict[str, int]] = {block: {} for block in network.tree.blocks}
    readers: dict[str, list[str]] = {block: [] for block in network.tree.blocks}
    inputs = {s.parameter: (s.name, 0 if s.transposed else 1) for s in network.tree.sites if s.kind == "linear"}
    for name, parameter in network.module.named_parameters(remove_duplicate=False):
        before, after = tuple(parameter.shape), shapes.get(name)
        if after == before:
            continue
        block = next((b for b in network.tree.blocks if name.startswith(b + ".")), None)
        axes = [] if after is None else [a for a, (x, y) in enumerate(zip(before, after, strict=True)) if x != y]
        if block is None or len(axes) != 1 or before[axes[0]] not in lengths:
            raise InputError(f"{what}: {name} would have to change in a way that is not known")
        slices[block][name] = axes[0]
        if name in inputs and inputs[name][1] == axes[0]:
            readers[block].append(inputs[name][0])
    if not any(slices.values()):
        raise InputError(f"{what}: its class takes their width from their number, so none can go alone")
    if any(len(found) != 1 for found in readers.values()):
        raise InputError(f"{what}: not every block has one matrix that reads them")
    return Width(kind, units, config, slices, {block: found[0] for block, found in readers.items()})


def without_units(
    network: Network,
    kept: Mapping[str, tuple[Width, Mapping[str, Tensor]]],
    mixed: Mapping[str, Tensor] | None = None,
) -> Network:
    """The network of the units that stay.

    kept:  kind -> (width, block -> indices of its units that stay, rising).
    mixed: reader -> ``[entries, kept entries]``: its new matrix is ``W mixed`` in the place of some columns of W.
    """
    config: dict[str, Any] = {}
    changes: dict[str, Change] = {}
    transposed = {s.name: s.transposed for s in network.tree.sites}
    for width, blocks in kept.values():
        left = {len(units) for units in blocks.values()}
        if len(left) != 1 or left == {0}:
            raise InputError(f"every block must keep the same number of {width.kind}, at least one, not {sorted(left)}")
        config |= width.config_without(width.units - left.pop())
        for block, units in blocks.items():
            reader = width.readers[block]
            for name, axis in width.slices[block].items():
                entries = width.entries(units, network.module.get_parameter(name).shape[axis])
                if mixed and name == f"{reader}.weight" and reader in mixed:
                    changes[name] = mixing(mixed[reader], transposed[reader])
                else:
                    changes[name] = picking(entries, axis)
    return network.reshaped(config, changes)


def picking(entries: Tensor, axis: int) -> Change:
    return Change(lambda value: value.index_select(axis, entries), axis != 0)


def mixing(matrix: Tensor, transposed: bool) -> Change:
    if transposed:
        return Change(lambda value: matrix.T @ value, False)
    return Change(lambda value: value @ matrix, True)
