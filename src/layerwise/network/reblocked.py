"""The same network with other blocks: some left out, moved or repeated.

``reblocked(network, (0, 1, 3))`` is a network of three blocks that reads the weights of blocks 0, 1 and 3. Its config
says three, its parameters are numbered anew, and it is opened, calibrated, compressed and saved like any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from layerwise.errors import InputError
from layerwise.network.network import Network
from layerwise.network.sites import find_sites
from layerwise.network.skeleton import build_on_meta


def reblocked(network: Network, order: Sequence[int]) -> Network:
    """The network that runs the blocks of ``order``; the network itself when nothing changes.

    Raises ``InputError`` for an order that names no block, or for a config that does not say how many blocks it has.
    """
    blocks = network.tree.blocks
    if tuple(order) == tuple(range(len(blocks))):
        return network
    if not order:
        raise InputError(f"{network.name} would have no block left; keep at least one of {len(blocks)}")
    checkpoint = dataclasses.replace(
        network.checkpoint, config=config_of(network.checkpoint.config, network.module, len(blocks), tuple(order))
    )
    module = build_on_meta(network.architecture, checkpoint.config)
    tree = find_sites(module)
    if len(tree.blocks) != len(order):
        raise InputError(f"{network.architecture} does not take its number of blocks from its config")
    parameters = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    old = {name: old_name(name, tree.blocks, blocks, order) for name in parameters}
    return dataclasses.replace(
        network,
        checkpoint=checkpoint,
        module=module,
        tree=tree,
        stored=network.stored.renamed(old),
        changes={name: network.changes[before] for name, before in old.items() if before in network.changes},
    )


def config_of(config: dict[str, Any], module: nn.Module, count: int, order: tuple[int, ...]) -> dict[str, Any]:
    """The config of a module of ``count`` blocks with those of ``order``; lists with an entry a block follow them."""
    aliases = getattr(type(module.config), "attribute_map", {})
    names = {"num_hidden_layers", aliases.get("num_hidden_layers")}
    if not any(config.get(name) == count for name in names if name):
        raise InputError(
            f"config.json of this {type(module).__name__} does not say that it has {count} blocks (num_hidden_layers); "
            f"add it"
        )
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in names:
            changed[key] = len(order)
        elif isinstance(value, list) and len(value) == count and key.endswith(("_types", "_layers", "_pattern")):
            changed[key] = [value[i] for i in order]
        else:
            changed[key] = value
    return changed


def old_name(name: str, new: Sequence[str], old: Sequence[str], order: Sequence[int]) -> str:
    """What a parameter or a site is called in the network of all blocks."""
    for place, block in enumerate(new):
        if name.startswith(block + "."):
            return old[order[place]] + name.removeprefix(block)
    return name


def new_name(name: str, old: Sequence[str], new: Sequence[str], order: Sequence[int]) -> str | None:
    """What it is called in the network of ``order``; None where its block is gone."""
    for index, block in enumerate(old):
        if name.startswith(block + "."):
            return new[order.index(index)] + name.removeprefix(block) if index in order else None
    return name
