"""Stored forms made of other stored forms: how the tensors of the parts share one weight's names.

The first part's main tensor becomes the main tensor of the whole, as 1-D bytes; every other tensor gets its part's
name in front of its suffix:

    parts left, right (both grouped integers)   ->   "", _left_scale, _left_zero, _right, _right_scale, _right_zero
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from layerwise.encoding.dense import DTYPES
from layerwise.encoding.encoded import Encoded, Layout, layout_bytes
from layerwise.encoding.integer import stored_shape
from layerwise.errors import InputError


def joined(parts: Mapping[str, Encoded]) -> dict[str, Tensor]:
    """Part name -> form, the first being the main one  ->  suffix -> tensor of the whole."""
    main = next(iter(parts))
    tensors: dict[str, Tensor] = {}
    for name, part in parts.items():
        for suffix, tensor in part.tensors().items():
            if name == main and not suffix:
                tensors[""] = tensor.contiguous().view(-1).view(torch.uint8)
            else:
                tensors[f"_{name}{suffix}"] = tensor
    return tensors


def joined_layout(parts: Mapping[str, Layout]) -> Layout:
    """The layout of ``joined``, from the layouts of the parts."""
    main = next(iter(parts))
    layout: Layout = {}
    for name, part in parts.items():
        for suffix, (dtype, shape) in part.items():
            if name == main and not suffix:
                layout[""] = (torch.uint8, (layout_bytes({"": (dtype, shape)}),))
            else:
                layout[f"_{name}{suffix}"] = (dtype, shape)
    return layout


def restored(
    spec: Mapping[str, Any], tensors: Mapping[str, Tensor], names: Collection[str], forms: Collection[str]
) -> list[Encoded]:
    """The parts in the order of ``names``, each a form of ``forms``; raises ``InputError`` for anything that misfits.

    ``spec[name]`` is the spec of a part.
    """
    from layerwise.encoding.forms import restore_form  # knows every form, these too

    own = spec.get("form")
    shares = _split(tensors, names, own)
    parts: list[Encoded] = []
    for place, name in enumerate(names):
        inner = spec.get(name)
        found = inner.get("form") if isinstance(inner, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(found, str) or found not in forms:
            raise InputError(f"the part {name!r} of a {own} form must be one of {', '.join(forms)}, not {found!r:.40}")
        mine = shares[name]
        if place == 0 and "" in mine and inner["form"] == "dense":
            mine[""] = _from_bytes(mine[""], inner)
        parts.append(restore_form(inner, mine))
    return parts


def _split(tensors: Mapping[str, Tensor], names: Collection[str], own: object) -> dict[str, dict[str, Tensor]]:
    """Suffix -> tensor of the whole  ->  part name -> (suffix -> tensor)."""
    shares: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    main = next(iter(names))
    for suffix, tensor in tensors.items():
        if not suffix:
            shares[main][""] = tensor
            continue
        for name in names:
            rest = suffix.removeprefix(f"_{name}")
            if rest != suffix and (rest.startswith("_") or (not rest and name != main)):
                shares[name][rest] = tensor
                break
        else:
            raise InputError(f"a {own} form has no tensor {suffix!r}")
    return shares


def _from_bytes(stored: Tensor, spec: Mapping[str, Any]) -> Tensor:
    """The dense matrix that a main tensor's bytes hold."""
    shape, dtype = stored_shape(spec), DTYPES.get(str(spec.get("dtype")))
    if dtype is None:
        raise InputError(f"a dense form is stored as {', '.join(DTYPES)}, not {spec.get('dtype')!r}")
    size = shape[0] * shape[1] * dtype.itemsize
    if stored.dtype != torch.uint8 or tuple(stored.shape) != (size,):
        raise InputError(
            f"the main tensor must be uint8 [{size}], not {str(stored.dtype).removeprefix('torch.')} "
            f"{list(stored.shape)}"
        )
    if stored.storage_offset() % dtype.itemsize or stored.data_ptr() % dtype.itemsize or not stored.is_contiguous():
        stored = stored.clone()  # a view of another type must begin on its boundary
    return stored.view(dtype).view(shape)
