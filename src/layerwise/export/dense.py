"""An artifact as a plain fp16 (or bf16) checkpoint that needs no layerwise: every site decoded once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from layerwise.errors import InputError
from layerwise.network import safetensors_file
from layerwise.network.artifact import METADATA, Artifact, FileLayout, open_artifact, staged, write_config
from layerwise.network.checkpoint import WEIGHTS, to_plain
from layerwise.network.companions import copy_companions


def export_dense(artifact_path: str | os.PathLike[str], out_dir: str | os.PathLike[str], force: bool = False) -> int:
    """Write a dense checkpoint into ``out_dir`` and return the bytes of its weights.

    One matrix is in memory at a time. Raises ``InputError`` where ``out_dir`` exists (unless ``force``), where the
    artifact is damaged, or where a decoded value does not fit the type.
    """
    artifact = open_artifact(artifact_path)
    if artifact.arrangement is not None:
        raise InputError(
            f"{artifact_path} is an arrangement of shared or parallel blocks, which no ordinary checkpoint can say"
        )
    if artifact.depths is not None:
        raise InputError(f"{artifact_path} runs its blocks for some inputs only, which no ordinary checkpoint can say")
    dtype = artifact.plain_dtype
    layout: FileLayout = {}
    for name in artifact.plain:
        info = artifact.checkpoint.tensors[name]
        layout[name] = (dtype if info.dtype.is_floating_point else info.dtype, info.shape)
    for name, site in artifact.sites.items():
        layout[f"{name}.weight"] = (dtype, site.shape)

    held = _published(artifact) or {name: (shape, [name]) for name, (_, shape) in layout.items()}

    def content(name: str) -> Tensor:
        if name in artifact.plain:
            return to_plain(artifact.checkpoint.read(name), dtype, name)
        return _decoded(artifact, name.removesuffix(".weight"), dtype)

    def produce() -> Iterator[tuple[str, Tensor]]:
        for name, (shape, parts) in held.items():
            whole = content(parts[0]) if len(parts) == 1 else torch.cat([content(p).flatten() for p in parts])
            yield name, whole.view(shape)

    layout = {name: (layout[parts[0]][0], shape) for name, (shape, parts) in held.items()}
    config = {k: v for k, v in artifact.config.items() if k not in ("quantization_config", "torch_dtype")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    with staged(Path(out_dir), force) as folder:
        size = safetensors_file.write(folder / WEIGHTS, layout, produce(), METADATA)
        copy_companions(artifact.checkpoint.companions, folder)
        write_config(folder, config)
    return size


def _published(artifact: Artifact) -> dict[str, tuple[tuple[int, ...], list[str]]]:
    """Published tensor -> (shape, what it holds), where a network of experts is; see ``published_names``."""
    names = [*artifact.plain, *(f"{site}.weight" for site in artifact.sites)]
    if not any(re.search(r"\.\d+\.down_proj\.weight$", name) for name in names):
        return {}
    import transformers

    if not hasattr(transformers, artifact.checkpoint.architecture):
        return {}  # it was made from a module
    from layerwise.network.expert_names import published_names
    from layerwise.network.skeleton import build_on_meta

    return published_names(build_on_meta(artifact.checkpoint.architecture, artifact.config))


def _decoded(artifact: Artifact, site: str, dtype: torch.dtype) -> Tensor:
    """A site's weight in its module's layout, converted a few rows at a time."""
    encoded = artifact.encoded(site)
    weight = torch.empty(encoded.shape, dtype=dtype)
    for start, stop in encoded.row_chunks():
        weight[start:stop] = encoded.decode_rows(start, stop)
    if not bool(torch.isfinite(weight).all()):
        raise InputError(f"site {site} decodes to values that {str(dtype).removeprefix('torch.')} cannot hold")
    return artifact.sites[site].as_kept(weight)
