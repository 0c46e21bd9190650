"""Under which names checkpoints hold the experts of a layer.

Three ways are in use: one matrix an expert under our own names (``experts.3.down_proj.weight``), one matrix an expert
under others (Mixtral's ``w1``, ``w3``, ``w2``), and all experts in one tensor. The second is known to transformers,
which merges such matrices while it loads them; its own table is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.network.experts import Experts, experts_of, fused_names, open_experts
from layerwise.network.safetensors_file import TensorInfo

PIECES_OF = (("gate_proj", "up_proj"), ("down_proj",))  # what the fused tensors are merged from, in order


def stored_experts(module: nn.Module, stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Parameter of an opened expert -> where its matrix lies, for those that are not stored under their own names."""
    opened = experts_of(module)
    if not opened:
        return {}
    prefix = getattr(module, "base_model_prefix", "") + "."
    found: dict[str, TensorInfo] = {}
    fused: dict[str, tuple[str, int]] = {}  # every name a fused tensor may have -> its experts' path, and which it is
    for path, experts in opened.items():
        for part, name in enumerate(experts.fused):
            whole = f"{path}.{name}"
            for choice in (whole, prefix + whole, whole.removeprefix(prefix)):
                fused[choice] = path, part
    for name, (today, pattern) in todays_names(module, stored).items():
        if today not in fused:
            continue
        path, part = fused[today]
        if pattern is None:
            found |= matrices_in(stored[name], path, opened[path], part)
            continue
        numbers, (place, count) = re.findall(r"\.(\d+)(?=\.)", name), pattern
        if numbers and count == len(PIECES_OF[part]):
            found[f"{path}.{numbers[-1]}.{PIECES_OF[part][place]}.weight"] = stored[name]
    return found


def matrices_in(info: TensorInfo, path: str, experts: Experts, part: int) -> dict[str, TensorInfo]:
    """The matrices of all experts inside a fused tensor, as tensors of their own; none if its shape is another."""
    if tuple(info.shape) != experts.fused_shapes()[part]:
        return {}
    size = info.dtype.itemsize
    return {
        f"{path}.{name}": replace(
            info, shape=shape, start=info.start + start * size, nbytes=shape[0] * shape[1] * size
        )
        for name, which, start, shape in experts.slices()
        if which == part
    }  # fmt: skip


def todays_names(module: nn.Module, stored: Iterable[str]) -> dict[str, tuple[str, tuple[int, int] | None]]:
    """Stored name -> (the name transformers loads it under, its (place, count) among the tensors merged there)."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # a transformers that converts nothing
        return {name: (name, None) for name in stored}
    steps = get_model_conversion_mapping(module)  # type: ignore[arg-type]
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters: list[Any] = [step for step in steps if not isinstance(step, WeightRenaming)]
    out: dict[str, tuple[str, tuple[int, int] | None]] = {}
    for name in stored:
        today, pattern = rename_source_key(name, renamings, converters)
        merged = None
        if pattern is not None:
            sources = next(c.source_patterns for c in converters if pattern in c.source_patterns)
            merged = sources.index(pattern), len(sources)
        out[name] = today, merged
    return out


def open_stored_experts(model: nn.Module, tensors: Iterable[str]) -> dict[str, Experts]:
    """Open the experts of a model that is about to be loaded where its file holds each matrix under its own name.

    Raises ``InputError`` where the class computes something else than it did when the file was written.
    """
    prefix = getattr(model, "base_model_prefix", "") + "."
    stored = {name.removeprefix(prefix) for name in tensors}
    wanted = {
        path
        for path, member in model.named_modules()
        if fused_names(member) is not None and f"{path.removeprefix(prefix)}.0.down_proj.weight" in stored
    }
    opened = open_experts(model, wanted)
    for path in sorted(wanted - set(opened)):
        kind = type(model.get_submodule(path)).__name__
        raise InputError(f"this version of transformers mixes the experts of {path} in a way of its own ({kind})")
    return opened


def own_conversions(steps: Iterable[Any], stored: Iterable[str]) -> list[Any]:
    """Of transformers' steps those that an artifact needs: renamings that apply to a name in it, and no merging."""
    from transformers.core_model_loading import WeightRenaming

    names = list(stored)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    return [step for step in renamings if any(step.rename_source_key(name)[0] != name for name in names)]


def published_names(module: nn.Module) -> dict[str, tuple[tuple[int, ...], list[str]]]:
    """Tensor of a plain checkpoint as transformers itself would save it -> (shape, the parameters that it holds).

    Several where a checkpoint holds the experts of a layer in one tensor: they lie in it one after the other.
    Nothing for a network without opened experts, whose parameters have their own names.
    """
    opened = experts_of(module)
    if not opened:
        return {}
    from layerwise.network.skeleton import StoredNames

    inside = tuple(f"{path}." for path in opened)
    state: dict[str, Tensor] = {n: p for n, p in module.named_parameters() if not n.startswith(inside)}
    for path, experts in opened.items():
        for name, shape in zip(experts.fused, experts.fused_shapes(), strict=True):
            state[f"{path}.{name}"] = torch.empty(shape, device="meta")
    try:
        from transformers.core_model_loading import revert_weight_conversion

        state = revert_weight_conversion(module, state)  # type: ignore[arg-type]
    except ImportError:
        pass
    tensors = {n: TensorInfo(n, Path(), t.dtype, tuple(t.shape), 0, t.nbytes) for n, t in state.items()}
    names = StoredNames(module, SimpleNamespace(tensors=tensors))  # type: ignore[arg-type]
    held: dict[str, list[tuple[int, str]]] = {}
    for parameter, _ in module.named_parameters():
        place = names.place(parameter)
        held.setdefault(place.name, []).append((place.start, parameter))
    return {name: (tensors[name].shape, [parameter for _, parameter in sorted(parts)]) for name, parts in held.items()}
