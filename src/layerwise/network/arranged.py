"""Networks whose blocks are arranged: shared between places, looped, side by side, with a little of their own.

An order of different blocks is a network like any other (``reblocked.py``). What such a network cannot say is an
``Arrangement``: its config asks for as many blocks as there are *uses*, which gives every use its slot of the KV cache;
its ``quantization_config`` holds the arrangement; the stored blocks are the first ones, and our quantizer puts
``ArrangedBlocks`` in the place of the list, so that ``import layerwise`` and plain ``from_pretrained`` load it.

Refused, by name, is what would compute something else: blocks that are not built alike (sliding and full attention by
turns, routed experts in some), and scores scaled by the block's number (an option of GPT-2).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.network.arranged_blocks import USES, check_alike
from layerwise.network.arrangement import Arrangement, checked
from layerwise.network.artifact import METADATA, artifact_config, open_artifact, staged, weights_bytes, write_config
from layerwise.network.artifact_config import sites_config
from layerwise.network.checkpoint import WEIGHTS, to_plain
from layerwise.network.companions import copy_companions
from layerwise.network.network import Network
from layerwise.network.reblocked import config_of, new_name, reblocked
from layerwise.network.safetensors_file import write
from layerwise.network.sites import find_blocks
from layerwise.network.skeleton import build_on_meta, parameter_owners

# ---------------------------------------------------------------- networks


def arranged(network: Network, arrangement: Arrangement, extras: Mapping[str, Tensor] | None = None) -> Network:
    """The network that runs its blocks so; the ordinary network of an order, where the arrangement is one.

    extras: values of the arrangement's extras: ``<use>.own.<path>``, ``<use>.left.<linear>.weight`` [out, r] and
        ``<use>.right.<linear>.weight`` [r, in].

    It cannot be run block by block, so it is measured whole (``in_memory``) and saved (``write_arranged``). Raises
    ``InputError`` for blocks that the network does not have, that are not alike, or for extras that do not fit.
    """
    if network.arrangement is not None:
        raise InputError(f"{network.name} is arranged already; start from the network that it was made from")
    if network.whole:
        raise InputError("a module in memory has no config that could hold an arrangement; open a checkpoint")
    arrangement, count = checked(arrangement), len(network.tree.blocks)
    if arrangement.blocks > count:
        raise InputError(f"{network.name} has blocks 0 to {count - 1}, and no block {arrangement.blocks - 1}")
    numbered, order = arrangement.renumbered()
    kept = reblocked(network, order)
    if numbered.plain:
        return kept
    check_alike(network.module, [network.module.get_submodule(path) for path in network.tree.blocks])
    config = longer_config(network.checkpoint.config, network.module, count, numbered, order)
    config["quantization_config"] = sites_config({}, numbered)
    module = build_on_meta(network.architecture, config)
    root = f"{kept.tree.blocks[0].rpartition('.')[0]}.{USES}."
    parameters = dict(module.named_parameters(remove_duplicate=False))
    given = {root + name: value for name, value in (extras or {}).items()}
    wanted = {name: tuple(p.shape) for name, p in parameters.items() if name.startswith(root)}
    if {name: tuple(value.shape) for name, value in given.items()} != wanted:
        raise InputError(f"the extras do not fit their arrangement: it needs {wanted or 'none'}")
    return dataclasses.replace(
        kept,
        checkpoint=dataclasses.replace(network.checkpoint, config=config),
        module=module,
        tree=dataclasses.replace(kept.tree, parameters=kept.tree.parameters + sum(v.numel() for v in given.values())),
        stored=kept.stored.renamed({name: name for name in parameters if name not in wanted}),
        given={**kept.given, **given},
    )


def longer_config(
    config: dict[str, Any], module: nn.Module, count: int, numbered: Arrangement, order: tuple[int, ...]
) -> dict[str, Any]:
    """The config of as many blocks as there are uses: those of ``order`` first, then any."""
    return config_of(config, module, count, (*order, *[order[-1]] * (numbered.uses - len(order))))


def in_memory(network: Network, arrangement: Arrangement | None = None) -> nn.Module:
    """The whole network with its weights as float32, in eval mode; with ``arrangement``, run so."""
    if arrangement is not None:
        network = arranged(network, arrangement)
    module = build_on_meta(network.architecture, network.checkpoint.config)
    for names in parameter_owners(module).values():
        parameter = nn.Parameter(network.read(names[0]), requires_grad=False)
        for name in names:
            path, _, leaf = name.rpartition(".")
            module.get_submodule(path)._parameters[leaf] = parameter
    return module


# ---------------------------------------------------------------- saving


def write_arranged(network: Network, out: str | os.PathLike[str], force: bool = False) -> int:
    """Save a network of ``arranged`` in the types that its weights are stored in; returns the bytes.

    A reblocked or rewritten network is saved the same way, as an ordinary checkpoint.
    """
    names = [names[0] for names in parameter_owners(network.module).values()]
    float_type = max((network.stored.place(n).dtype for n in names if n not in network.given), key=lambda d: d.itemsize)
    dtypes = {n: float_type if n in network.given else network.stored.place(n).dtype for n in names}
    layout = {n: (dtypes[n], tuple(network.module.get_parameter(n).shape)) for n in names}
    config = artifact_config(network.checkpoint, {})
    with staged(Path(out), force) as folder:
        write(folder / WEIGHTS, layout, ((n, to_plain(network.read(n), dtypes[n], n)) for n in names), METADATA)
        copy_companions(network.checkpoint.companions, folder)
        write_config(folder, config)
        return weights_bytes(folder)


def arrange_artifact(
    source: str | os.PathLike[str], out: str | os.PathLike[str], arrangement: Arrangement, force: bool = False
) -> int:
    """Save an artifact with its blocks arranged; returns its bytes. Packed sites are copied as they are stored.

    Blocks that no step uses are left out. Raises ``InputError`` where ``arranged`` would.
    """
    artifact = open_artifact(source)
    if artifact.arrangement is not None:
        raise InputError(f"{source} is arranged already; start from the artifact that it was made from")
    checkpoint = artifact.checkpoint
    module = build_on_meta(checkpoint.architecture, checkpoint.config)
    arrangement, blocks = checked(arrangement), find_blocks(module)
    if arrangement.blocks > len(blocks):
        raise InputError(f"{source} has blocks 0 to {len(blocks) - 1}, and no block {arrangement.blocks - 1}")
    check_alike(module, [module.get_submodule(path) for path in blocks])
    numbered, order = arrangement.renumbered()
    config = longer_config(checkpoint.config, module, len(blocks), numbered, order)
    names = {old: new_name(old, blocks, blocks, order) for old in checkpoint.tensors}
    layout = {new: (checkpoint.tensors[o].dtype, checkpoint.tensors[o].shape) for o, new in names.items() if new}
    sites = {new: site for s, site in artifact.sites.items() if (new := new_name(s, blocks, blocks, order))}
    with staged(Path(out), force) as folder:
        write(folder / WEIGHTS, layout, ((new, checkpoint.read(o)) for o, new in names.items() if new), METADATA)
        copy_companions(checkpoint.companions, folder)
        replaced = dataclasses.replace(checkpoint, config=config)
        write_config(folder, artifact_config(replaced, sites, arrangement=None if numbered.plain else numbered))
        return weights_bytes(folder)
