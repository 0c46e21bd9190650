"""An artifact as one GGUF file for llama.cpp: every site in a block type that holds its values exactly.

A site whose grid no type holds is refused by name, or changed with ``reencode``. Where it is whole levels times a step,
the levels stay, and steps (8-bit ones times a factor) and offsets are rounded to fp16: a weight moves by a thousandth.
Anything else is rounded again to Q4_0, Q5_0 or Q8_0 (groups of 32 with a symmetric grid), the first of these that has
at least as many bits a weight as the site was stored in, or to fp16 where the columns are no multiple of 32. What that
costs is for the caller to measure: ``Conversion.forms`` has the new weights. Norms and biases are fp32, which llama.cpp
insists on; other plain tensors keep their type.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerwise.encoding.dense import Dense
from layerwise.encoding.encoded import Encoded
from layerwise.encoding.ggml_blocks import INTEGER_TYPES, TYPES, fits, pack
from layerwise.encoding.ggml_forms import BITS, blocks_of, form_of, offset_type
from layerwise.encoding.grid import Grid, fit_grid, round_to_grid
from layerwise.encoding.integer import GroupedInteger
from layerwise.encoding.levels import RUN, Levels, half_holds, levels_of
from layerwise.encoding.sums import Sum
from layerwise.encoding.superblocks import Superblock
from layerwise.errors import InputError
from layerwise.export.gguf_networks import Target, target_of
from layerwise.export.gguf_tokenizer import tokenizer_values
from layerwise.network import gguf_file
from layerwise.network.artifact import Artifact, open_artifact
from layerwise.network.gguf_file import Value

ROUNDED = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}
FLOATS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


@dataclass
class Conversion:
    """What an export did.

    bytes: of the file.   types: site -> type of ggml.   forms: site -> its new weight, where it was rounded again.
    """

    bytes: int = 0
    types: dict[str, str] = field(default_factory=dict)
    forms: dict[str, Encoded] = field(default_factory=dict)


def export_gguf(
    artifact_path: str | os.PathLike[str], file: str | os.PathLike[str], reencode: bool = False, force: bool = False
) -> Conversion:
    """Write ``file``; raises ``InputError`` where llama.cpp has no equal for the network, its tokenizer or a site."""
    artifact, path = open_artifact(artifact_path), Path(file)
    if path.exists() and (not force or path.is_dir()):
        raise InputError(f"{path} exists; choose another place or give --force to replace it")
    if artifact.inputs:
        raise InputError(
            f"{artifact.directory} multiplies quantized inputs at {next(iter(artifact.inputs))}; llama.cpp chooses the "
            f"precision of inputs itself, so export an artifact without them"
        )
    target = target_of(artifact.checkpoint.architecture)
    values: dict[str, Value] = {
        "general.architecture": target.name,
        "general.name": artifact.directory.resolve().name,
        "general.quantization_version": 2,
        **target.keys(artifact.config, target.name),
        **tokenizer_values(artifact.directory, int(artifact.config["vocab_size"])),
    }
    types, inexact = choose_types(artifact, reencode)
    done = Conversion(types=types)
    layout, sources = _layout(artifact, target, done.types)
    values["general.file_type"] = _file_type(layout)

    def produce(name: str) -> Iterator[NDArray[Any]]:
        parameter = sources[name]
        site = parameter.removesuffix(".weight")
        if site not in done.types:
            yield from _plain(artifact, target, parameter, layout[name][0])
            return
        form = artifact.encoded(site)
        if site in inexact:
            form = done.forms[site] = changed(form, done.types[site])
        order = target.row_order(parameter, form.shape[0], artifact.config)
        yield from _blocks(form, done.types[site], order)

    path.parent.mkdir(parents=True, exist_ok=True)
    done.bytes = gguf_file.write(path, values, layout, produce)
    return done


def choose_types(artifact: Artifact, reencode: bool) -> tuple[dict[str, str], set[str]]:
    """Site -> the smallest type that holds it exactly, or else that it is rounded to; and the sites that are rounded.

    Without ``reencode`` a site that would be rounded is an ``InputError`` that names it.
    """
    types, inexact = {}, {}
    for site, stored in artifact.sites.items():
        if stored.kernel is not None:
            raise InputError(f"site {site} is a convolution; the gguf export knows linears and tables")
        form = artifact.encoded(site)
        found = exact_type(form)
        if found is None:
            inexact[site] = _reason(form)
        types[site] = found or near_type(form) or nearest_type(form)
    if inexact and not reencode:
        site, reason = next(iter(inexact.items()))
        more = f" (and {len(inexact) - 1} more)" if len(inexact) > 1 else ""
        raise InputError(
            f"no type of ggml holds site {site}{more} exactly: it {reason}; give --reencode to round such sites again, "
            f"or compress with groups of 32, 64 or 128 and 16-bit scales"
        )
    return types, set(inexact)


def exact_type(form: Encoded) -> str | None:
    """The smallest type that holds a form exactly: blocks of integers, else fp16 where that holds every value."""
    if isinstance(form, Dense):
        return FLOATS[form.values.dtype]
    if isinstance(form, Sum) and offset_type(form):
        return offset_type(form)
    if isinstance(form, Superblock):
        return form.kind
    return _first_that_fits(form, INTEGER_TYPES, False) or ("F16" if half_holds(form) else None)


def near_type(form: Encoded) -> str | None:
    """The smallest type that holds a form's levels, steps and offsets rounded to fp16; None where it has no levels."""
    return _first_that_fits(form, [name for name in INTEGER_TYPES if name in BITS], True)


def _first_that_fits(form: Encoded, names: Sequence[str], near: bool) -> str | None:
    levels, left = levels_of(form, near), list(names)
    if isinstance(levels, str):
        return None
    for start, stop in form.row_chunks():
        part = levels.rows(start, stop)
        left = [name for name in left if fits(name, *part, near)]
    return left[0] if left else None


def nearest_type(form: Encoded) -> str:
    """The type that a form is rounded to where none holds it."""
    if form.shape[1] % RUN:
        return "F16"
    bits = 8 * form.nbytes / (form.shape[0] * form.shape[1])
    return next((name for name in ROUNDED if TYPES[name].bits >= bits), "Q8_0" if bits <= 9 else "F16")


def changed(form: Encoded, name: str) -> Encoded:
    """A form that its type does not hold exactly, as what the type holds."""
    levels = levels_of(form, near=True)
    if name in BITS and not isinstance(levels, str) and near_type(form) == name:
        return form_of(name, pack(name, *levels.rows(0, form.shape[0])), form.shape[1])
    return rounded(form, name)


def rounded(form: Encoded, name: str) -> Encoded:
    """A form rounded to a type: to its grid, with the clip search of the grid, or to fp16."""
    weight = form.decode()
    if name == "F16":
        return Dense.of(weight, torch.float16)
    fitted = fit_grid(weight, Grid(bits=ROUNDED[name], group=RUN, symmetric=True), clip=True)
    return GroupedInteger.from_codes(round_to_grid(weight, fitted), fitted)


def _reason(form: Encoded) -> str:
    levels = levels_of(form)
    return levels if isinstance(levels, str) else "has levels that reach further than those of every type"


def _layout(
    artifact: Artifact, target: Target, types: Mapping[str, str]
) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """Tensors in the order of the network's blocks: name -> (type, shape), and name -> our parameter."""
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    sources: dict[str, str] = {}
    for site, kind in types.items():
        rows, columns = artifact.sites[site].spec["shape"]
        layout[target.place(f"{site}.weight")] = kind, (rows, columns)
        sources[target.place(f"{site}.weight")] = f"{site}.weight"
    for parameter in artifact.plain:
        info = artifact.checkpoint.tensors[parameter]
        if not info.dtype.is_floating_point or (parameter == "lm_head.weight" and _tied(artifact)):
            continue
        name = target.place(parameter)
        shape = tuple(reversed(info.shape)) if target.is_transposed(parameter) else info.shape
        layout[name] = "F32" if len(shape) == 1 else FLOATS.get(info.dtype, "F32"), shape
        sources[name] = parameter
    names = sorted(layout, key=_order)
    return {name: layout[name] for name in names}, sources


def _tied(artifact: Artifact) -> bool:
    return bool(artifact.config.get("tie_word_embeddings", True))


def _order(name: str) -> tuple[int, str]:
    block = name.split(".")
    return (int(block[1]), name) if block[0] == "blk" else (-1, name)


def _file_type(layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """llama.cpp's number for "mostly of this type": the one with the most weights."""
    weights: dict[str, int] = {}
    for kind, shape in layout.values():
        if len(shape) > 1:
            weights[kind] = weights.get(kind, 0) + shape[0] * shape[1]
    return TYPES[max(weights, key=lambda kind: weights[kind])].file_type


def _plain(artifact: Artifact, target: Target, parameter: str, kind: str) -> Iterator[NDArray[Any]]:
    tensor = artifact.checkpoint.read(parameter)
    if target.is_transposed(parameter):
        tensor = tensor.T
    order = target.row_order(parameter, tensor.shape[0], artifact.config)
    if order is not None:
        tensor = tensor[torch.from_numpy(order)]
    yield _floats(tensor, kind)


def _floats(tensor: Tensor, kind: str) -> NDArray[Any]:
    if kind == "BF16":
        return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    return tensor.to(torch.float16 if kind == "F16" else torch.float32).contiguous().numpy()


def _blocks(form: Encoded, kind: str, order: NDArray[np.int64] | None) -> Iterator[NDArray[Any]]:
    """A form's rows in a type that holds it exactly, a few at a time, or at once where they change their order."""
    parts = []
    levels = levels_of(form)
    with_offsets = blocks_of(kind, form) if isinstance(form, Sum) and kind in INTEGER_TYPES else None
    for start, stop in form.row_chunks():
        if kind not in INTEGER_TYPES:
            part: NDArray[Any] = _floats(form.decode_rows(start, stop), kind)
        elif isinstance(form, Superblock):
            part = form.packed[start:stop].numpy()
        elif with_offsets is not None:
            part = with_offsets[start:stop]
        else:
            assert isinstance(levels, Levels)
            part = pack(kind, *levels.rows(start, stop))
        if order is None:
            yield part
        else:
            parts.append(part)
    if order is not None:
        yield np.concatenate(parts)[order]
