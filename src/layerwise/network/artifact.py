"""The saved result on disk: packed weights in ``model.safetensors``, a config that describes them, companions.

A site's codes lie under the name of its weight, the rest of its form beside it (``….weight_scale``). A tied table and
head are stored once, under the table's name. A site in the dense form is an ordinary parameter in its module's own
layout, so that it loads as one; it has no entry in the config.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from layerwise.encoding.encoded import Encoded
from layerwise.encoding.encoded import Layout as FormLayout
from layerwise.encoding.forms import restore_form
from layerwise.encoding.inputs import InputGrid, input_layout, restore_inputs
from layerwise.errors import InputError
from layerwise.network import safetensors_file
from layerwise.network.arrangement import Arrangement
from layerwise.network.artifact_config import StoredSite, parse_sites, sites_config, stored_arrangement, stored_depths
from layerwise.network.checkpoint import WEIGHTS, Checkpoint, open_checkpoint
from layerwise.network.companions import copy_companions
from layerwise.network.depths import Depths
from layerwise.network.packings import METHODS
from layerwise.network.safetensors_file import TensorInfo

METADATA = {"format": "pt"}  # transformers asks for it
FileLayout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def is_dense(layout: FormLayout) -> bool:
    """Whether a form's layout is the weight itself, and so an ordinary parameter."""
    return set(layout) == {""} and layout[""][0].is_floating_point and len(layout[""][1]) == 2


def artifact_layout(
    encoded: Mapping[str, FormLayout],
    plain: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    transposed: Collection[str] = (),
) -> FileLayout:
    """Every tensor of ``model.safetensors``: name -> (dtype, shape).

    encoded:    parameter name (``<site>.weight``) -> layout of its form.
    plain:      parameters that are not encoded, as they are stored.
    transposed: names in ``encoded`` whose module keeps ``[in, out]``.
    """
    layout: FileLayout = {}
    for parameter, form in encoded.items():
        for suffix, (dtype, shape) in form.items():
            turned = parameter in transposed and is_dense(form)
            layout[parameter + suffix] = (dtype, tuple(reversed(shape)) if turned else tuple(shape))
    clash = next((name for name in plain if name in layout), None)
    if clash is not None:
        raise ValueError(f"{clash} would be stored twice")
    return layout | {name: (dtype, tuple(shape)) for name, (dtype, shape) in plain.items()}


def with_inputs(layout: FileLayout, inputs: Mapping[str, FormLayout]) -> FileLayout:
    """With what the grids of quantized inputs store: site -> layout of its grid."""
    stored = {f"{site}.input{suffix}": value for site, grid in inputs.items() for suffix, value in grid.items()}
    return layout | stored


def predicted_size(
    encoded: Mapping[str, FormLayout],
    plain: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    checkpoint: Checkpoint | None = None,
    inputs: Mapping[str, FormLayout] = MappingProxyType({}),
) -> int:
    """Bytes of all safetensors files of the artifact, to the byte, before anything is written."""
    copied = sum(c.weight_bytes for c in checkpoint.companions) if checkpoint else 0
    return safetensors_file.file_size(with_inputs(artifact_layout(encoded, plain), inputs), METADATA) + copied


def write_artifact(
    folder: Path,
    checkpoint: Checkpoint,
    layout: FileLayout,
    encoded: Iterable[tuple[str, Encoded]],
    plain: Iterable[tuple[str, Tensor]],
    transposed: Collection[str] = (),
    kernels: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    opened: bool = False,
    inputs: Mapping[str, InputGrid] = MappingProxyType({}),
) -> int:
    """Write weights, config and companions into ``folder`` and return the size that ``predicted_size`` promised.

    kernels: names in ``encoded`` whose module is a convolution, and the kernel that its matrix flattens.
    opened:  the network's experts are stored one by one, so that it takes layerwise to load it even if all is dense.
    inputs:  site -> grid of its inputs, of sites that are encoded; ``layout`` has its tensors (``with_inputs``).

    ``encoded`` and ``plain`` are consumed one by one: one site is in memory at a time. Give a folder of ``staged``.
    """
    sites: dict[str, StoredSite] = {}

    def produce() -> Iterator[tuple[str, Tensor]]:
        for parameter, form in encoded:
            stored = form.tensors()
            turned = parameter in transposed
            if is_dense({suffix: (t.dtype, tuple(t.shape)) for suffix, t in stored.items()}):
                own = stored[""].T if turned else stored[""]
                yield parameter, own.reshape(layout[parameter][1]) if parameter in kernels else own
                continue
            site = parameter.removesuffix(".weight")
            grid = inputs.get(site)
            sites[site] = StoredSite(form.spec(), turned, kernels.get(parameter), None if grid is None else grid.spec())
            for suffix, tensor in stored.items():
                yield parameter + suffix, tensor
        yield from plain
        for site, grid in inputs.items():
            for suffix, tensor in grid.tensors().items():
                yield f"{site}.input{suffix}", tensor

    folder.mkdir(parents=True, exist_ok=True)
    safetensors_file.write(folder / WEIGHTS, layout, produce(), METADATA)
    copy_companions(checkpoint.companions, folder)
    write_config(folder, artifact_config(checkpoint, sites, opened))
    return weights_bytes(folder)


def artifact_config(
    checkpoint: Checkpoint,
    sites: Mapping[str, StoredSite],
    opened: bool = False,
    arrangement: Arrangement | None = None,
) -> dict[str, Any]:
    """The input's config with the sites' description; the type that the network computes in stays the input's.

    arrangement: of the blocks; by default the one that the input's config has, if any.
    """
    arrangement = arrangement or stored_arrangement(checkpoint.config.get("quantization_config"))
    config = {k: v for k, v in checkpoint.config.items() if k not in ("auto_map", "quantization_config")}
    if config.get("dtype") is None and config.get("torch_dtype") is None:
        sizes: dict[torch.dtype, int] = {}
        for info in checkpoint.tensors.values():
            if info.dtype.is_floating_point:
                sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        if sizes:
            config["dtype"] = str(max(sizes, key=lambda d: sizes[d])).removeprefix("torch.")
    depths = stored_depths(checkpoint.config.get("quantization_config"))
    if sites or opened or arrangement is not None or depths is not None:
        config["quantization_config"] = sites_config(sites, arrangement, depths)
    return config


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def weights_bytes(folder: Path) -> int:
    """Size: bytes of all safetensors files below a folder."""
    return sum(path.stat().st_size for path in sorted(folder.rglob("*.safetensors")))


@contextlib.contextmanager
def staged(out: Path, force: bool = False) -> Iterator[Path]:
    """A folder beside ``out`` that becomes ``out`` by one rename, or disappears if the body fails."""
    check_free(out, force)
    partial = out.with_name(f".{out.name}.partial")
    replaced = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        check_free(out, force)
        shutil.rmtree(replaced, ignore_errors=True)
        if out.exists():
            os.rename(out, replaced)
        os.rename(partial, out)
        safetensors_file.sync_folder(out.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(out: Path, force: bool) -> None:
    """``InputError`` unless ``out`` may be written."""
    if out.exists() and not force:
        raise InputError(f"{out} exists; choose another place or give --force to replace it")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; an artifact is a directory")


# ---------------------------------------------------------------- reading


@dataclass
class Artifact:
    """An artifact on disk. Reads on demand; only the table looked up last is kept in memory, in its stored form."""

    checkpoint: Checkpoint
    sites: dict[str, StoredSite]
    _table: tuple[str, Encoded] | None = field(default=None, repr=False)
    _inputs: dict[str, InputGrid] | None = field(default=None, repr=False)

    @property
    def directory(self) -> Path:
        return self.checkpoint.directory

    @property
    def config(self) -> dict[str, Any]:
        return self.checkpoint.config

    @property
    def arrangement(self) -> Arrangement | None:
        """How its blocks are arranged, where they are."""
        return stored_arrangement(self.config.get("quantization_config"))

    @property
    def depths(self) -> Depths | None:
        """For which tokens or texts its blocks run."""
        return stored_depths(self.config.get("quantization_config"))

    @property
    def specs(self) -> dict[str, dict[str, Any]]:
        """Site -> spec of its form."""
        return {name: site.spec for name, site in self.sites.items()}

    @property
    def size(self) -> int:
        """Bytes of all safetensors files."""
        return self.checkpoint.safetensors_bytes

    @property
    def plain(self) -> tuple[str, ...]:
        """Names of the tensors that are stored as they are."""
        packed = {name for site in self.sites for name in (*self.stored(site).values(), *self.stored_inputs(site))}
        return tuple(name for name in self.checkpoint.tensors if name not in packed)

    @property
    def plain_dtype(self) -> torch.dtype:
        """The float type of what is not encoded: bf16 if most of it is, else fp16."""
        dtypes = [self.checkpoint.tensors[name].dtype for name in self.plain]
        bf16, floats = dtypes.count(torch.bfloat16), sum(d.is_floating_point for d in dtypes)
        wanted = self.config.get("dtype", self.config.get("torch_dtype"))
        return torch.bfloat16 if bf16 * 2 > floats or (not floats and wanted == "bfloat16") else torch.float16

    def stored(self, site: str) -> dict[str, str]:
        """Suffix -> name of the tensors of a site."""
        return self._by_site.get(site, {})

    def stored_inputs(self, site: str) -> list[str]:
        """Names of the tensors of a site's grid for its inputs."""
        spec = self.sites[site].inputs
        return [] if spec is None else [f"{site}.input{suffix}" for suffix in input_layout(spec)]

    def bytes_of(self, site: str) -> int:
        """Bytes of a site's tensors in the file."""
        return sum(self.checkpoint.tensors[name].nbytes for name in self.stored(site).values())

    def layout_at(self, site: str) -> dict[str, TensorInfo]:
        """Suffix -> type and shape of what ``buffers`` gives, from headers alone."""
        return {suffix: self.checkpoint.tensors[name] for suffix, name in self.stored(site).items()}

    def buffers(self, site: str) -> dict[str, Tensor]:
        """What a packed module of this site holds: suffix -> tensor."""
        return {suffix: self.checkpoint.read(name) for suffix, name in self.stored(site).items()}

    def giving(self, inputs: Mapping[str, InputGrid]) -> Artifact:
        """The same weights, multiplied by inputs on these grids instead of what the artifact says."""
        return replace(self, _inputs=dict(inputs))

    @cached_property
    def inputs(self) -> dict[str, InputGrid]:
        """Site -> grid of its inputs, where they are quantized."""
        if self._inputs is not None:
            return self._inputs
        found = {}
        for site, stored in self.sites.items():
            if stored.inputs is not None:
                names = self.stored_inputs(site)
                tensors = {name.removeprefix(f"{site}.input"): self.checkpoint.read(name) for name in names}
                try:
                    found[site] = restore_inputs(stored.inputs, tensors)
                except InputError as reason:
                    raise InputError(f"{self.directory}: the inputs of {site}: {reason}") from None
        return found

    @cached_property
    def _by_site(self) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        for name in self.checkpoint.tensors:
            site, dot, suffix = name.rpartition(".weight")
            if dot and (not suffix or suffix.startswith("_")):
                found.setdefault(site, {})[suffix] = name
        return found

    def encoded(self, site: str) -> Encoded:
        """The stored form of a site; raises ``InputError`` where tensors and spec do not fit."""
        tensors = {suffix: self.checkpoint.read(name) for suffix, name in self.stored(site).items()}
        try:
            return restore_form(self.sites[site].spec, tensors)
        except InputError as reason:
            raise InputError(f"{self.directory}: site {site} cannot be restored: {reason}") from None

    def read(self, parameter: str) -> Tensor:
        """A parameter as float32 in its module's own layout, decoded where it is encoded."""
        site = parameter.removesuffix(".weight")
        if site not in self.sites or site == parameter:
            return self.checkpoint.read_float(parameter)
        return self.sites[site].as_kept(self.encoded(site).decode())

    def read_rows(self, parameter: str, index: Tensor) -> Tensor:
        """Rows of a table as float32 ``[len(index), columns]``."""
        site = parameter.removesuffix(".weight")
        if site not in self.sites:
            return self.checkpoint.read_rows(parameter, index)
        if self.sites[site].transposed:
            return self.read(parameter)[index]
        if self._table is None or self._table[0] != site:
            self._table = site, self.encoded(site)
        return self._table[1].take_rows(index)

    def read_part(self, path: str) -> dict[str, Tensor]:
        """All parameters below a module path, by relative name, as float32."""
        names = [*self.plain, *(f"{site}.weight" for site in self.sites)]
        return {n.removeprefix(f"{path}."): self.read(n) for n in names if n.startswith(f"{path}.")}


def open_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Open a saved result, reading headers only. Raises ``InputError`` for anything that is not one.

    A directory without ``quantization_config`` opens as an artifact in which nothing is encoded; one that another tool
    has quantized opens with its encodings, where ``network/packings.py`` reads them.
    """
    checkpoint = open_checkpoint(path)
    described = checkpoint.config.get("quantization_config")
    if isinstance(described, dict) and described.get("quant_method") in METHODS:
        from layerwise.network.foreign import open_foreign

        return open_foreign(checkpoint)
    artifact = Artifact(checkpoint, {} if described is None else parse_sites(described))
    _ = artifact.arrangement, artifact.depths  # damaged ones are refused here
    wanted = {s: (f"{s}.weight", *artifact.stored_inputs(s)) for s in artifact.sites}
    missing = next((s for s, names in wanted.items() if any(n not in checkpoint.tensors for n in names)), None)
    if missing is not None:
        raise InputError(
            f"{checkpoint.directory} holds too little or nothing for its site {missing}; its files are not of one run"
        )
    return artifact
