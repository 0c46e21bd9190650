"""An artifact as a compressed-tensors checkpoint (``pack-quantized``), which vLLM and transformers load.

    weight_packed      int32 [out, ceil(in b / 32)]       codes, in one stream of bits a row, low bits first
    weight_scale       fp16  [out, groups]                steps
    weight_zero_point  int32 [ceil(out b / 32), groups]   zeros in words along the outputs; absent: symmetric
    weight_shape       int64 [2]                          out, in

stands for ``step * (code - zero)``, which is our own grid, so codes, zeros and steps are copied and nothing is rounded.
Every format (bits, group, zeros) of the plan is a config group that names its linears; all else is at 16 bits.

transformers 5 keeps symmetric weights packed in memory and cannot place packed zeros there, so a file of one format
with zeros asks it to decode while loading (``dequantize``). It decodes with one format for all linears, so that a
file of several formats, some with zeros, is for vLLM only, which multiplies all of them as they are. A bf16 network
computes with steps that its reader rounds to bf16; loaded in fp16 or fp32 they are exact.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.encoding.grid import Grid
from layerwise.encoding.integer import GroupedInteger
from layerwise.encoding.words import pack_words, word_count
from layerwise.errors import InputError
from layerwise.export.fitting import Fitting, Rounded, fit, refusals, unequal
from layerwise.network import safetensors_file
from layerwise.network.artifact import METADATA, Artifact, FileLayout, open_artifact, staged, write_config
from layerwise.network.checkpoint import WEIGHTS, to_plain
from layerwise.network.companions import copy_companions
from layerwise.network.sites import Site, find_sites
from layerwise.network.skeleton import build_on_meta
from layerwise.plan.file import read_plan
from layerwise.plan.targets import TARGETS, Target, described, find_target

EXPORT = "compressed-tensors"
ENGINES = ("vllm", "transformers")  # in the order in which they are tried


@dataclass(frozen=True)
class Exported:
    """What was written: bytes of the weights, for which engine it fits, and the sites that were rounded for it."""

    bytes: int
    target: str
    rounded: dict[str, Rounded]


def export_compressed_tensors(
    artifact_path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    target: str | None = None,
    reencode: bool = False,
    force: bool = False,
) -> Exported:
    """Write a compressed-tensors checkpoint into ``out_dir``; one matrix is in memory at a time.

    target: the engine that it is for; by default the plan's, else the first of vLLM and transformers that it fits.

    Raises ``InputError`` naming the first site that the engine cannot take, before anything is written, unless
    ``reencode`` lets it be rounded to the nearest grid.
    """
    fitting = fitting_of(open_artifact(artifact_path), target, reencode)
    return write_compressed_tensors(fitting, out_dir, force)


def fitting_of(artifact: Artifact, target: str | None = None, reencode: bool = False) -> Fitting:
    """The artifact as an engine will have it; ``InputError`` as ``export_compressed_tensors``."""
    sites = sites_of(artifact)
    engines = engines_for(artifact, target)
    formats = formats_of(artifact, sites)
    problems = []
    for engine in engines:
        wrong = {**refusals(artifact, sites, engine), **unequal(formats, engine)}
        if not wrong:
            return Fitting(artifact, sites, engine, {})
        problems.append(wrong)
    if reencode:
        return fit(artifact, sites, engines[0], formats)
    least = min(problems, key=len)
    more = f" (and {len(least) - 1} more sites)" if len(least) > 1 else ""
    raise InputError(
        f"{next(iter(least.values()))}{more}; make it with layerwise compress --target "
        f"{engines[problems.index(least)].name}, or round it with --reencode"
    )


def engines_for(artifact: Artifact, target: str | None) -> list[Target]:
    """The engines to try, the wanted one first; ``InputError`` for one that reads another format."""
    plan = artifact.directory / "plan.json"
    name = target if target is not None or not plan.is_file() else read_plan(plan).target
    wanted = find_target(name)
    if wanted is None or (target is None and wanted.export != EXPORT):
        return [TARGETS[name] for name in ENGINES]
    if wanted.export != EXPORT:
        raise InputError(f"{wanted.name} does not load {EXPORT}; export for it with --to {wanted.export}")
    return [wanted]


def sites_of(artifact: Artifact) -> dict[str, Site]:
    """The artifact's network, site by site; ``InputError`` where it is no architecture of transformers."""
    module = build_on_meta(artifact.checkpoint.architecture, artifact.config)
    sites = {site.name: site for site in find_sites(module).sites}
    missing = next((name for name in artifact.sites if name not in sites), None)
    if missing is not None:
        raise InputError(f"{artifact.directory} encodes {missing}, which a {type(module).__name__} does not have")
    return sites


def formats_of(artifact: Artifact, sites: Mapping[str, Site]) -> dict[str, str]:
    """Linear -> its format in words, on the grid that it has in a row of its width."""
    found = {}
    for name, site in sites.items():
        if site.kind == "linear":
            spec = artifact.specs.get(name)
            wide = spec is not None and site.columns <= (spec.get("group") or 0)
            found[name] = "16 bits" if spec is None else described({**spec, "group": 0} if wide else spec)
    return found


def write_compressed_tensors(fitting: Fitting, out_dir: str | os.PathLike[str], force: bool = False) -> Exported:
    """Write what was fitted; a folder appears by one rename, or not at all."""
    artifact = fitting.artifact
    dtype = artifact.plain_dtype
    packed = {name: grid_at(fitting, name) for name in artifact.sites if not fitting.dense(name)}
    layout: FileLayout = {}
    for name in artifact.plain:
        info = artifact.checkpoint.tensors[name]
        layout[name] = (dtype if info.dtype.is_floating_point else info.dtype, info.shape)
    for name, site in artifact.sites.items():
        if name in packed:
            layout |= {f"{name}.weight_{k}": v for k, v in packed_layout(packed[name], *site.spec["shape"]).items()}
        else:
            layout[f"{name}.weight"] = (dtype, site.shape)
    if any(site.experts for site in fitting.sites.values()):
        raise InputError(f"{artifact.directory} is a network of experts, which is not written as {EXPORT}")

    def produce() -> Iterator[tuple[str, Tensor]]:
        for name in artifact.plain:
            yield name, to_plain(artifact.checkpoint.read(name), dtype, name)
        for name in artifact.sites:
            if name not in packed:
                yield f"{name}.weight", to_plain(artifact.read(f"{name}.weight"), dtype, name)
                continue
            form = fitting.encoded(name)
            assert isinstance(form, GroupedInteger)
            for part, tensor in packed_tensors(form).items():
                yield f"{name}.weight_{part}", tensor

    config = {k: v for k, v in artifact.config.items() if k not in ("quantization_config", "torch_dtype")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    if packed:
        linears = [name for name, site in fitting.sites.items() if site.kind in ("linear", "head")]
        linears += [site.head for site in fitting.sites.values() if site.head]
        config["quantization_config"] = quantization_config(packed, fitting, linears)
    with staged(Path(out_dir), force) as folder:
        size = safetensors_file.write(folder / WEIGHTS, layout, produce(), METADATA)
        copy_companions(artifact.checkpoint.companions, folder)
        write_config(folder, config)
    return Exported(size, fitting.target.name, fitting.changed())


def grid_at(fitting: Fitting, name: str) -> Grid:
    """The grid that a packed site is written on, a group as wide as the row being the row."""
    grid = fitting.grids.get(name)
    spec = fitting.artifact.specs[name]
    bits, group, symmetric = (
        (spec["bits"], spec["group"], spec["symmetric"]) if grid is None else (grid.bits, grid.group, grid.symmetric)
    )
    return Grid(bits, 0 if group >= spec["shape"][1] else group, symmetric)


def packed_layout(grid: Grid, rows: int, columns: int) -> FileLayout:
    """Last part of the name -> (dtype, shape)."""
    groups = grid.groups(columns)
    layout: FileLayout = {
        "packed": (torch.int32, (rows, word_count(columns, grid.bits))),
        "scale": (torch.float16, (rows, groups)),
        "shape": (torch.int64, (2,)),
    }
    return layout if grid.symmetric else {**layout, "zero_point": (torch.int32, (word_count(rows, grid.bits), groups))}


def packed_tensors(form: GroupedInteger) -> dict[str, Tensor]:
    """The tensors of ``packed_layout``."""
    bits, zero = form.grid.bits, form.fitted.zero
    tensors = {
        "packed": pack_words(form.codes(), bits),
        "scale": form.fitted.scale,
        "shape": torch.tensor(form.shape),
    }
    return tensors if zero is None else {**tensors, "zero_point": pack_words(zero.T, bits).T.contiguous()}


def quantization_config(packed: Mapping[str, Grid], fitting: Fitting, linears: list[str]) -> dict[str, Any]:
    """A config group for every format, naming its linears; the linears at 16 bits are ignored by name."""
    formats: dict[Grid, list[str]] = {}
    for name, grid in packed.items():
        formats.setdefault(grid, []).append(name)
    ordered = sorted(formats.items(), key=lambda entry: (entry[0].bits, entry[0].group, entry[0].symmetric))
    groups = {
        f"group_{index}": {
            "targets": names,
            "weights": {
                "num_bits": grid.bits,
                "type": "int",
                "symmetric": grid.symmetric,
                "strategy": "group" if grid.group else "channel",
                "group_size": grid.group or -1,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
        for index, (grid, names) in enumerate(ordered)
    }
    alone = len(formats) == 1 and not ordered[0][0].symmetric
    return {
        "quant_method": EXPORT,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linears if name not in packed],
        **({"dequantize": True} if alone else {}),
    }
