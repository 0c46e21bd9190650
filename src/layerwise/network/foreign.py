"""Checkpoints that another tool has quantized, opened as artifacts: their codes become our grouped integers.

Everything that reads an artifact (``evaluate``, ``export``, ``load``, a network to compress) reads these too; the files
are not rewritten. A linear is unpacked when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from layerwise.encoding.encoded import Encoded
from layerwise.encoding.integer import integer_layout, integer_spec
from layerwise.errors import InputError, nearest
from layerwise.network.artifact import Artifact
from layerwise.network.artifact_config import StoredSite
from layerwise.network.checkpoint import Checkpoint
from layerwise.network.packings import Infos, Packing, Place, check_order, packing_of
from layerwise.network.safetensors_file import TensorInfo
from layerwise.network.sites import Site, find_sites
from layerwise.network.skeleton import build_on_meta

GROUP_INDEX = ("g_idx", "weight_g_idx")


@dataclass
class ForeignArtifact(Artifact):
    """An artifact over another tool's files. ``places``: site -> its grid and shape; ``paths``: site -> name there."""

    packing: Packing | None = None
    places: dict[str, Place] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()  # tensors that the network has no place for, such as biases of zeros

    @property
    def plain(self) -> tuple[str, ...]:
        return tuple(name for name in super().plain if name not in self.unused)

    def stored(self, site: str) -> dict[str, str]:
        """Last part -> name of the tensors of a site, as the other tool names them."""
        assert self.packing is not None
        path = self.paths.get(site, site)
        return {p: f"{path}.{p}" for p in self.packing.parts if f"{path}.{p}" in self.checkpoint.tensors}

    def encoded(self, site: str) -> Encoded:
        assert self.packing is not None
        tensors = {part: self.checkpoint.read(name) for part, name in self.stored(site).items()}
        try:
            return self.packing.encoded(site, tensors, self.places[site])
        except InputError as reason:
            raise InputError(f"{self.directory}: {reason}") from None

    def layout_at(self, site: str) -> dict[str, TensorInfo]:
        place = self.places[site]
        layout = integer_layout(place.grid, place.rows, place.columns)
        return {suffix: TensorInfo(suffix, self.directory, *form, 0, 0) for suffix, form in layout.items()}

    def buffers(self, site: str) -> dict[str, Tensor]:
        return self.encoded(site).tensors()


def open_foreign(checkpoint: Checkpoint) -> ForeignArtifact:
    """Open a GPTQ, AWQ or compressed-tensors checkpoint; reads headers, shapes and the groups of inputs.

    Raises ``InputError`` for what cannot be kept code by code, and for files that do not fit together.
    """
    try:
        packing = packing_of(checkpoint.config["quantization_config"])
    except InputError as reason:
        raise InputError(f"{checkpoint.directory}: {reason}") from None
    module = build_on_meta(checkpoint.architecture, checkpoint.config)
    known = {s.name: s for s in find_sites(module).sites}
    found = ForeignArtifact(checkpoint, {}, packing=packing)
    for name in checkpoint.tensors:
        path, dot, last = name.rpartition(".")
        if dot and last == packing.marks:
            site = site_at(path, known, module)
            found.paths[site.name] = path
            try:
                found.places[site.name] = place_of(found, site)
            except InputError as reason:
                raise InputError(f"{checkpoint.directory}: {reason}") from None
            place = found.places[site.name]
            spec = integer_spec(place.grid, place.rows, place.columns)
            found.sites[site.name] = StoredSite(spec, site.transposed)
    found.unused = unused(checkpoint.tensors, module)
    if not found.sites:
        method = checkpoint.config["quantization_config"]["quant_method"]
        raise InputError(f"{checkpoint.directory} says that it is quantized by {method}, but holds no packed linear")
    return found


def site_at(path: str, known: dict[str, Site], module: nn.Module) -> Site:
    """The site of a packed module: by its name, or by its name below or above the base model's prefix."""
    prefix = getattr(module, "base_model_prefix", "") + "."
    for name in (path, prefix + path, path.removeprefix(prefix)):
        if name in known:
            return known[name]
    raise InputError(
        f"the checkpoint packs {path}, which {type(module).__name__} does not have{nearest(path, list(known))}"
    )


def place_of(artifact: ForeignArtifact, site: Site) -> Place:
    """A site's grid and shape, held against the network's own."""
    packing, names = artifact.packing, artifact.stored(site.name)
    assert packing is not None
    if site.kind not in ("linear", "head"):
        raise InputError(f"{site.name} is packed, but it is no linear")
    infos: Infos = {part: artifact.checkpoint.tensors[name] for part, name in names.items()}
    shape = None
    if "weight_shape" in infos:
        if infos["weight_shape"].nbytes > 64:
            raise InputError(f"{site.name}.weight_shape must be two numbers")
        shape = artifact.checkpoint.read(names["weight_shape"])
    place = packing.place(site.name, infos, shape)
    if (place.rows, place.columns) != (site.rows, site.columns):
        raise InputError(
            f"{site.name} is packed as {[place.rows, place.columns]}, but config.json asks for "
            f"{[site.rows, site.columns]}"
        )
    for part in (p for p in GROUP_INDEX if p in infos):
        check_order(site.name, artifact.checkpoint.read(names[part]), place)
    return place


def unused(names: Iterable[str], module: nn.Module) -> frozenset[str]:
    """Names that are no parameter or buffer of the network, nor one below or above the base model's prefix."""
    prefix = getattr(module, "base_model_prefix", "") + "."
    own = set(dict(module.named_parameters(remove_duplicate=False))) | set(dict(module.named_buffers()))
    own |= {prefix + name for name in own} | {name.removeprefix(prefix) for name in own}
    return frozenset(name for name in names if name not in own)
