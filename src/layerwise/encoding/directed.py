"""Form ``directed``: group-wise integers whose groups run along the inputs of a row or along the outputs of a column.

Along the outputs, ``g`` consecutive rows of one column share a step and a zero: the matrix is stored as the form
``integer`` of its transpose, so that a column of large inputs spoils only its own groups. Layout version 1.

Every tensor is that of the ``integer`` form of the matrix (``inputs``) or of its transpose (``outputs``), flattened to
one dimension. With ``either`` each tensor has room for whichever direction is larger, filled up with zero bytes, so
that the size is known before the direction is chosen; where both sides are multiples of the group nothing is filled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from layerwise.encoding.bitplanes import LAYOUT_VERSION
from layerwise.encoding.encoded import Encoded, Layout
from layerwise.encoding.grid import Grid
from layerwise.encoding.integer import (
    GroupedInteger,
    check_index,
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

    def tensors(self) -> dict[str, Tensor]:
        layout = directed_layout(self.inner.grid, *self.shape, self.along, self.either)
        stored = {}
        for suffix, tensor in self.inner.tensors().items():
            flat = tensor.new_zeros(layout[suffix][1])
            flat[: tensor.numel()] = tensor.reshape(-1)
            stored[suffix] = flat
        return stored

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
        for suffix, (_, shape) in integer_layout(grid, *sides).items():
            size = math.prod(shape)
            own[suffix] = tensors[suffix][:size].view(shape)
            if bool(tensors[suffix][size:].any()):
                raise InputError(f"{suffix or 'the main tensor'} of a directed form goes on behind its end")
        return cls(GroupedInteger.restore(inner, own), along, either)

    def decode_rows(self, start: int, stop: int) -> Tensor:
        if self.along == "inputs":
            return self.inner.decode_rows(start, stop)
        return self.decode()[start:stop]

    def take_rows(self, index: Tensor) -> Tensor:
        check_index(index, self.shape[0])
        return self.inner.take_rows(index) if self.along == "inputs" else self.decode()[index]

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
    both = {"inputs": integer_layout(grid, rows, columns), "outputs": integer_layout(grid, columns, rows)}
    layout: Layout = {}
    for suffix, (dtype, shape) in both[along].items():
        sizes = [math.prod(made[suffix][1]) for made in both.values()]
        layout[suffix] = (dtype, (max(sizes) if either else math.prod(shape),))
    return layout
