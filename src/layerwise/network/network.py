"""An open network: checkpoint, module without weights, site tree, and the reading of its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.encoding.encoded import Encoded
from layerwise.errors import InputError
from layerwise.network import safetensors_file
from layerwise.network.arrangement import Arrangement
from layerwise.network.artifact_config import stored_arrangement, stored_depths
from layerwise.network.checkpoint import Checkpoint, open_checkpoint
from layerwise.network.depths import Depths
from layerwise.network.sites import Site, SiteTree, find_sites
from layerwise.network.skeleton import StoredNames, build_on_meta


@dataclass(frozen=True)
class Change:
    """What a rewrite does to a stored parameter when it is read.

    apply:   float32 in, float32 of the same shape out, in the module's own layout.
    by_rows: whether rows change alone: ``apply(value)[index] == apply(value[index])``.
    """

    apply: Callable[[Tensor], Tensor]
    by_rows: bool

    def after(self, first: Change) -> Change:
        """``first``, then this."""
        return Change(lambda value: self.apply(first.apply(value)), self.by_rows and first.by_rows)


@dataclass(frozen=True)
class Network:
    """What ``layerwise.open`` returns. Holds no weights; ``read`` fetches them from disk.

    changes: parameter -> what a network-wide rewrite does to it on the way.
    given:   parameters that the checkpoint does not hold, with their values.
    """

    checkpoint: Checkpoint
    module: nn.Module
    tree: SiteTree
    stored: StoredNames
    plain_dtype: torch.dtype  # what is not encoded is stored in this type
    changes: Mapping[str, Change] = field(default_factory=dict, kw_only=True)
    given: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)

    @property
    def name(self) -> str:
        return self.checkpoint.directory.name

    @property
    def architecture(self) -> str:
        return self.checkpoint.architecture

    @property
    def arrangement(self) -> Arrangement | None:
        """How its stored blocks run, where that is not one after the other."""
        if self.checkpoint is None:  # the search for a residual stream runs a bare module
            return None
        return stored_arrangement(self.checkpoint.config.get("quantization_config"))

    @cached_property
    def parts(self) -> tuple[tuple[str, ...], ...]:
        """Paths of the blocks that run together, in order: each alone, or those of a step or a loop of an arrangement.

        No block is in two parts, so that what a part needs and what is measured in it can be dealt with at once.
        """
        arrangement, blocks = self.arrangement, self.tree.blocks
        if arrangement is None:
            return tuple((block,) for block in blocks)
        together = (
            sorted({i for place in part for i in arrangement.steps[place].blocks}) for part in arrangement.parts()
        )
        return tuple(tuple(blocks[i] for i in part) for part in together)

    def part_of(self, block: str) -> int:
        """Which part a block is in."""
        return next(i for i, part in enumerate(self.parts) if block in part)

    @property
    def depths(self) -> Depths | None:
        """For which tokens or texts its blocks run, where that is not for all."""
        return None if self.checkpoint is None else stored_depths(self.checkpoint.config.get("quantization_config"))

    @property
    def whole(self) -> bool:
        """Whether it runs whole in memory, and not block by block from disk."""
        return False

    def kept_buffers(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Buffers that an artifact has to hold, and their layout: none where the config makes them all."""
        return {}

    def read(self, parameter: str) -> Tensor:
        """A parameter as float32, in the module's own layout."""
        if parameter in self.given:
            return self.given[parameter].detach().float()
        value = safetensors_file.read_float(self.stored.place(parameter))
        return self.changes[parameter].apply(value) if parameter in self.changes else value

    def read_rows(self, parameter: str, index: Tensor) -> Tensor:
        """Rows of a 2-D parameter as float32 ``[len(index), columns]``, without reading the rest."""
        change = self.changes.get(parameter)
        if parameter in self.given:
            return self.read(parameter)[index]
        if change is not None and not change.by_rows:
            return self.read(parameter)[index]
        rows = safetensors_file.read_rows(self.stored.place(parameter), index).float()
        return rows if change is None else change.apply(rows)

    def kept(self, site: Site) -> Encoded | None:
        """The form that a site came in, if the network was quantized already and nothing has rewritten it since."""
        return None

    def kept_spec(self, site: Site) -> Mapping[str, Any] | None:
        """The spec of ``kept``, from headers alone."""
        return None

    def bytes_of(self, site: Site) -> int:
        """Bytes of a site's matrix in the checkpoint."""
        return self.stored.place(site.parameter).nbytes

    def read_site(self, site: Site) -> Tensor:
        """The stored matrix of a site, ``[rows, columns]`` float32."""
        return site.as_matrix(self.read(site.parameter))

    def read_part(self, path: str) -> dict[str, Tensor]:
        """All parameters below a module path, by relative name."""
        part = self.module.get_submodule(path)
        return {name: self.read(f"{path}.{name}") for name, _ in part.named_parameters()}

    def outer_parameters(self) -> list[str]:
        """Names of the parameters outside the blocks, tied ones once."""
        inside = tuple(b + "." for b in self.tree.blocks)
        return [n for n, _ in self.module.named_parameters() if not n.startswith(inside)]

    def plain_parameters(self, encoded_sites: Iterable[str]) -> list[str]:
        """Parameters that no encoded site covers, tied ones once: norms, biases, position tables."""
        covered = {f"{name}.weight" for name in encoded_sites}
        return [n for n, _ in self.module.named_parameters() if n not in covered]

    def plain_layout(self, encoded_sites: Iterable[str]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """How everything that no encoded site covers is stored: name -> (dtype, shape)."""
        parameters = self.plain_parameters(encoded_sites)
        layout = {n: (self.plain_dtype, tuple(self.module.get_parameter(n).shape)) for n in parameters}
        return layout | self.kept_buffers()

    def again(self) -> Network:
        """The same checkpoint with a module of its own, so that two sets of weights can be in memory at once."""
        return replace(self, module=build_on_meta(self.architecture, self.checkpoint.config))

    def changed(self, changes: Mapping[str, Change], config: Mapping[str, Any]) -> Network:
        """The network with parameters changed as they are read, and entries added to its config.json."""
        before = self.changes
        chained = {n: change.after(before[n]) if n in before else change for n, change in changes.items()}
        checkpoint = replace(self.checkpoint, config={**self.checkpoint.config, **config})
        return replace(self, checkpoint=checkpoint, changes={**before, **chained})

    def reshaped(self, config: Mapping[str, Any], changes: Mapping[str, Change]) -> Network:
        """The network of another config, whose parameters are this one's, brought into their new shapes when read.

        config:  entries of config.json that are replaced.
        changes: parameter -> what makes its new value; each must give the shape that the new config asks for.

        Parameters keep their names. Sizes in bits per weight count the parameters of the new shape.
        Raises ``InputError`` where the new config asks for parameters that this network does not have.
        """
        wanted = self.changed(changes, config)
        module = build_on_meta(self.architecture, wanted.checkpoint.config)
        parameters = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        missing = next((name for name in parameters if name not in self.stored.of), None)
        if missing is not None:
            raise InputError(f"{self.name} has no parameter {missing}, which its class asks for in the new shape")
        stored = self.stored.renamed({name: name for name in parameters})
        return replace(wanted, module=module, tree=find_sites(module), stored=stored)

    def untied(self) -> Network:
        """The network with a head of its own where it is tied to the table; both are read from the one stored matrix.

        Sizes in bits per weight stay those of the network as it came, which counts the shared matrix once.
        Raises ``InputError`` for an architecture whose head cannot be told from its table.
        """
        pairs = [(s.parameter, f"{s.head}.weight") for s in self.tree.sites if s.head]
        if not pairs:
            return self
        tensors = dict(self.checkpoint.tensors)
        for table, head in pairs:
            stored = tensors[self.stored.of[table]]
            tensors |= {name: replace(stored, name=name) for name in (table, head)}
        config = {**self.checkpoint.config, "tie_word_embeddings": False}
        checkpoint = replace(self.checkpoint, config=config, tensors=tensors)
        module = build_on_meta(self.architecture, config)
        tree = replace(find_sites(module), parameters=self.tree.parameters)
        if any(s.head for s in tree.sites):
            raise InputError(f"{self.architecture} has one matrix for table and head and cannot be given two")
        changes = dict(self.changes)
        for table, head in pairs:
            if table in changes:
                changes[head] = changes[table]
        return replace(
            self, checkpoint=checkpoint, module=module, tree=tree, stored=self._names(module, checkpoint),
            changes=changes,
        )  # fmt: skip

    def _names(self, module: nn.Module, checkpoint: Checkpoint) -> StoredNames:
        return StoredNames(module, checkpoint)


def open_network(source: str | Path, dtype: str = "auto") -> Network:
    """Open a checkpoint directory or hub id. Reads headers only.

    dtype: what is not encoded is stored in; ``auto`` is float16, or bfloat16 for a bfloat16 checkpoint.

    A checkpoint that is quantized already opens with its encodings kept (``network/stored.py``).
    Raises ``InputError`` in one sentence for anything that is not a loadable safetensors checkpoint of a network
    made of repeated blocks.
    """
    checkpoint = open_checkpoint(source)
    if "quantization_config" in checkpoint.config:
        settings = checkpoint.config["quantization_config"]
        arranged = stored_arrangement(settings) is not None or stored_depths(settings) is not None
        if arranged and settings.get("sites"):
            raise InputError(f"{source} is an encoded arrangement; start from the dense checkpoint it was made from")
        if not arranged:
            from layerwise.network.stored import open_stored

            return open_stored(checkpoint, dtype)
    module = build_on_meta(checkpoint.architecture, checkpoint.config)
    plain = checkpoint.storage_dtype if dtype == "auto" else getattr(torch, dtype)
    return Network(checkpoint, module, find_sites(module), StoredNames(module, checkpoint), plain)


def reads_images(network: Network) -> bool:
    """Whether its batches are images: a module in memory, or an architecture that takes ``pixel_values``."""
    return network.whole or getattr(network.module, "main_input_name", None) == "pixel_values"


def hidden_width(network: Network) -> int:
    """Width of the hidden state between blocks."""
    return int(network.module.config.hidden_size)  # type: ignore[union-attr, arg-type]


def output_width(network: Network) -> int:
    """Width of the widest output per token: the vocabulary under a head, else the hidden state."""
    heads = [s.rows for s in network.tree.sites if s.kind == "head" or s.head]
    return heads[0] if heads else hidden_width(network)
