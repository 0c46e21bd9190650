"""A network whose weights are encoded already: an artifact of ours, or what another tool has quantized.

Its weights are what the encodings decode to, so that every act takes it as it takes a dense network; the encodings
stay at hand (``kept``), as candidates that change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.encoding.encoded import Encoded
from layerwise.errors import InputError
from layerwise.network.artifact import Artifact, open_artifact
from layerwise.network.artifact_config import METHOD
from layerwise.network.checkpoint import Checkpoint
from layerwise.network.network import Network
from layerwise.network.packings import METHODS
from layerwise.network.sites import Site, find_sites
from layerwise.network.skeleton import StoredNames, build_on_meta


@dataclass(frozen=True)
class StoredNetwork(Network):
    """A network over an artifact; nothing is decoded before it is read."""

    artifact: Artifact = field(kw_only=True)

    def read(self, parameter: str) -> Tensor:
        site = self._site(parameter)
        if site is None:
            return super().read(parameter)
        value = self.artifact.sites[site].as_kept(self.artifact.encoded(site).decode())
        return self.changes[parameter].apply(value) if parameter in self.changes else value

    def read_rows(self, parameter: str, index: Tensor) -> Tensor:
        site, change = self._site(parameter), self.changes.get(parameter)
        if site is None:
            return super().read_rows(parameter, index)
        if change is not None and not change.by_rows:
            return self.read(parameter)[index]
        rows = self.artifact.read_rows(f"{site}.weight", index)
        return rows if change is None else change.apply(rows)

    def kept(self, site: Site) -> Encoded | None:
        name = self._site(site.parameter)
        return None if name is None or site.parameter in self.changes else self.artifact.encoded(name)

    def kept_spec(self, site: Site) -> Mapping[str, Any] | None:
        name = self._site(site.parameter)
        return None if name is None or site.parameter in self.changes else self.artifact.sites[name].spec

    def bytes_of(self, site: Site) -> int:
        name = self._site(site.parameter)
        return super().bytes_of(site) if name is None else self.artifact.bytes_of(name)

    def untied(self) -> Network:
        tables = [s.name for s in self.tree.sites if s.head and self._site(s.parameter) is not None]
        if tables:
            raise InputError(f"{tables[0]} is encoded and tied to a head; only a dense table can be given up as tied")
        return super().untied()

    def _names(self, module: nn.Module, checkpoint: Checkpoint) -> StoredNames:
        return StoredNames(module, checkpoint, packed_shapes(self.artifact))

    def _site(self, parameter: str) -> str | None:
        """The artifact's site that holds a parameter."""
        stored = self.stored.of.get(parameter, "")
        site = stored.removesuffix(".weight")
        return site if site != stored and site in self.artifact.sites else None


def packed_shapes(artifact: Artifact) -> dict[str, tuple[int, ...]]:
    """Encoded parameter -> the shape that its module has."""
    return {f"{name}.weight": tuple(site.shape) for name, site in artifact.sites.items()}


def open_stored(checkpoint: Checkpoint, dtype: str = "auto") -> StoredNetwork:
    """Open a checkpoint with a ``quantization_config`` as a network; ``InputError`` for methods that we do not read."""
    settings = checkpoint.config["quantization_config"]
    method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else "unknown"
    if method not in (METHOD, *METHODS):
        raise InputError(
            f"{checkpoint.directory} is quantized already ({method}), and layerwise keeps only {', '.join(METHODS)} "
            f"and its own encodings; start from the dense checkpoint"
        )
    artifact = open_artifact(checkpoint.directory)
    quantized = next((name for name, site in artifact.sites.items() if site.inputs is not None), None)
    if quantized is not None:
        raise InputError(f"{checkpoint.directory} rounds the inputs of {quantized}; only weights can be kept encoded")
    module = build_on_meta(artifact.checkpoint.architecture, artifact.config)
    plain = artifact.plain_dtype if dtype == "auto" else getattr(torch, dtype)
    names = StoredNames(module, artifact.checkpoint, packed_shapes(artifact))
    return StoredNetwork(artifact.checkpoint, module, find_sites(module), names, plain, artifact=artifact)
