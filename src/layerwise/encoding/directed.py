"""Form ``directed``: group-wise integers whose groups run along the inputs of a row or along the outputs of a column.

Along the outputs, ``g`` consecutive rows of one column share a step and a zero: the matrix is stored as the form
``integer`` of its transpose, so that a column of large inputs spoils only its own groups. Layout version 1.

Every tensor is that of the ``integer`` form of the matrix (``inputs``) or of its transpose (``outputs``), flattened to
one dimension; whole zeros are packed as one run, not row by row. With ``either`` each tensor has room for whichever
direction is larger, filled up with zero bytes, so that the size is known before the direction is chosen; where both
sides are multiples of the group and of 8, nothing is filled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerwise.encoding.bitplanes import LAYOUT_VERSION, pack, row_bytes, unpack, unpack_columns
from layerwise.encoding.encoded import Encoded, Layout, check_index
from layerwise.encoding.grid import Grid
from layerwise.encoding.integer import (
    GroupedInteger,
    check_tensors,
    check_version,
    integer_layout,
    stored_shape,
)
from layerwise.errors import InputError

DIRECTIONS = ("inputs", "outputs")


@dataclass(frozen=True, eq=False)
class Directed(Encoded):
    """``inner`` is the matrix [rows, columns], or its transpose [columns, rows] when ``along`` is ``outputs``."""

    form: ClassVar[str] = "directed"
    inner: GroupedInteger
    along: str
    either: bool

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        first, second = self.inner.shape
        return (first, second) if self.along == "inputs" else (second, first)

    @property
    def own(self) -> Layout:
        """What this direction needs, without the room for the other."""
        return directed_layout(self.inner.grid, *self.shape, self.along, False)

    def tensors(self) -> dict[str, Tensor]:
        layout = directed_layout(self.inner.grid, *self.shape, self.along, self.either)
        stored = self.inner.tensors()
        if self.inner.fitted.zero is not None and not self.inner.grid.float_zero:
            stored["_zero"] = pack(self.inner.fitted.zero.reshape(1, -1), self.inner.grid.bits)
        tensors = {}
        for suffix, (dtype, shape) in layout.items():
            tensors[suffix] = torch.zeros(shape, dtype=dtype, device=self.inner.packed.device)
            tensors[suffix][: stored[suffix].numel()] = stored[suffix].reshape(-1)
        return tensors

    def spec(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "layout": LAYOUT_VERSION,
            "shape": list(self.shape),
            "along": self.along,
            "either": self.either,
            "integers": self.inner.spec(),
        }

    @classmethod
    def restore(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Directed:
        rows, columns = stored_shape(spec)
        check_version(spec, "codes")
        along, either, inner = (spec.get(key) for key in ("along", "either", "integers"))
        if along not in DIRECTIONS or not isinstance(along, str):
            raise InputError(f"the groups of a directed form run along {' or '.join(DIRECTIONS)}, not {along!r}")
        if not isinstance(either, bool):
            raise InputError(f"either of a directed form is true or false, not {either!r}")
        if not isinstance(inner, Mapping) or inner.get("form") != GroupedInteger.form:
            raise InputError("what a directed form holds is described under integers, as the form integer")
        sides = (rows, columns) if along == "inputs" else (columns, rows)
        if stored_shape(inner) != sides:
            raise InputError(f"a {rows} x {columns} matrix along its {along} holds integers of shape {list(sides)}")
        try:
            names = ("bits", "group", "symmetric", "scale_bits", "float_zero")
            grid = Grid(**{name: inner[name] for name in names}, float_scale=inner.get("float_scale", False))
        except KeyError as missing:
            raise InputError(f"the description of an integer form lacks {missing.args[0]}") from None
        check_tensors(directed_layout(grid, rows, columns, along, either), tensors)
        own = {}
        for suffix, (_, (size,)) in directed_layout(grid, rows, columns, along, False).items():
            own[suffix] = tensors[suffix][:size]
            if bool(tensors[suffix][size:].any()):
                raise InputError(f"{suffix or 'the main tensor'} of a directed form goes on behind its end")
        wanted = integer_layout(grid, *sides)
        if "_zero" in own and not grid.float_zero:
            groups = grid.groups(sides[1])
            zero = unpack(own["_zero"][None], sides[0] * groups, grid.bits)
            own["_zero"] = pack(zero.view(sides[0], groups), grid.bits)
        return cls(GroupedInteger.restore(inner, {s: t.reshape(wanted[s][1]) for s, t in own.items()}), along, either)

    def decode_rows(self, start: int, stop: int) -> Tensor:
        if self.along == "inputs":
            return self.inner.decode_rows(start, stop)
        return self._columns(torch.arange(self.shape[0], device=self.inner.packed.device)[start:stop])

    def take_rows(self, index: Tensor) -> Tensor:
        check_index(index, self.shape[0])
        return self.inner.take_rows(index) if self.along == "inputs" else self._columns(index)

    def _columns(self, index: Tensor) -> Tensor:
        """These columns of the transpose as rows."""
        fitted = self.inner.fitted
        codes = unpack_columns(self.inner.packed, index, fitted.grid.bits, fitted.columns)
        group = index // fitted.grid.width(fitted.columns)
        return ((codes.float() - fitted.zeros()[:, group]) * fitted.steps()[:, group]).T.contiguous()

    def decode(self) -> Tensor:
        return self.inner.decode() if self.along == "inputs" else self.inner.decode().T.contiguous()

    def multiply(self, x: Tensor) -> Tensor:
        if self.along == "inputs":
            return self.inner.multiply(x)
        # a chunk of the transpose's rows is a chunk of the inputs: the parts add up
        whole = x.new_zeros(*x.shape[:-1], self.shape[0])
        for start, stop in self.inner.row_chunks():
            whole += x[..., start:stop] @ self.inner.decode_rows(start, stop).to(x.dtype).to(x.device)
        return whole


def directed_layout(grid: Grid, rows: int, columns: int, along: str, either: bool) -> Layout:
    """Suffix -> (dtype, shape) of every tensor of a directed form of this shape."""
    sizes = {"inputs": _flat(grid, rows, columns), "outputs": _flat(grid, columns, rows)}
    layout: Layout = {}
    for suffix, (dtype, _) in integer_layout(grid, rows, columns).items():
        needed = [made[suffix] for made in sizes.values()] if either else [sizes[along][suffix]]
        layout[suffix] = (dtype, (max(needed),))
    return layout


def _flat(grid: Grid, rows: int, columns: int) -> dict[str, int]:
    """Suffix -> length of every tensor of one direction."""
    sizes = {suffix: math.prod(shape) for suffix, (_, shape) in integer_layout(grid, rows, columns).items()}
    if "_zero" in sizes and not grid.float_zero:
        sizes["_zero"] = row_bytes(rows * grid.groups(columns), grid.bits)
    return sizes
