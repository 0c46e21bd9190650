"""Form ``scattered``: entries anywhere in the matrix in fp16, the rest as group-wise integers.

=====================  ==============================  ==========================================================
stored tensor          type and shape                  holds
=====================  ==============================  ==========================================================
``""``, ``_scale``, …  as in the form ``integer``      all entries; those that are kept have a code to spare
``_kept_count``        uint16 [rows]                   how many of each row are kept
``_kept_column``       uint16 [count]                  their columns, row after row, rising within a row
``_kept_value``        fp16 [count]                    what these entries are
=====================  ==============================  ==========================================================

Where the form ``outliers`` keeps as many entries in every row, here only their total is given: ``32 count`` bits, and
16 bits a row. A kept entry *replaces* what the integers say, so it decodes to its fp16 value exactly. (A product that
wants a sum stores nothing new: it subtracts the integers at the kept entries once, on loading.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerwise.encoding.bitplanes import LAYOUT_VERSION
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

WIDEST = 2**16 - 1  # columns, so that sixteen bits also count a whole row
SPARSE = ("_kept_count", "_kept_column", "_kept_value")


@dataclass(frozen=True, eq=False)
class Scattered(Encoded):
    """``rest`` with some entries replaced; ``start`` int64 [rows + 1] is where each row's entries begin."""

    form: ClassVar[str] = "scattered"
    rest: GroupedInteger
    start: Tensor
    column: Tensor
    value: Tensor

    @staticmethod
    def of(weight: Tensor, kept: Tensor, rest: GroupedInteger) -> Scattered:
        """Keep the entries of ``weight`` [rows, columns] where ``kept``, a mask of its shape, says so.

        Raises ``InputError`` for a row too wide, an empty mask or a value that fp16 cannot hold.
        """
        check_width(weight.shape[1])
        row, column = kept.nonzero(as_tuple=True)  # row after row, columns rising
        value = weight.detach()[row, column].half()
        if not len(value):
            raise InputError("a matrix of which nothing is kept is stored as the form integer")
        if not bool(torch.isfinite(value).all()):
            raise InputError("the weight holds kept entries that float16 cannot hold (too large, NaN or infinity)")
        return Scattered(rest, starts(kept.sum(1)), column.to(torch.uint16), value)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.rest.shape

    def tensors(self) -> dict[str, Tensor]:
        count = self.start.diff().to(torch.uint16)
        return self.rest.tensors() | dict(zip(SPARSE, (count, self.column, self.value), strict=True))

    def spec(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "layout": LAYOUT_VERSION,
            "shape": list(self.shape),
            "count": len(self.column),
            "rest": self.rest.spec(),
        }

    @classmethod
    def restore(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Scattered:
        rows, columns = stored_shape(spec)
        check_version(spec, "kept entries")
        count, rest = spec.get("count"), spec.get("rest")
        check_width(columns)
        if type(count) is not int or not 1 <= count <= rows * columns:
            raise InputError(f"a {rows} x {columns} matrix keeps 1 to {rows * columns} entries, not {count!r}")
        if not isinstance(rest, Mapping) or rest.get("form") != GroupedInteger.form:
            raise InputError("what is not kept is described under rest, as the form integer")
        if stored_shape(rest) != (rows, columns):
            raise InputError(f"the kept entries belong to a {rows} x {columns} matrix, the rest does not")
        dense = {suffix: tensor for suffix, tensor in tensors.items() if suffix not in SPARSE}
        integers = GroupedInteger.restore(rest, dense)
        check_tensors(scattered_layout(integers.grid, rows, columns, count), tensors)
        start = starts(tensors[SPARSE[0]].to(torch.int64))
        if int(start[-1]) != count:
            raise InputError(f"_kept_count must add up to {count}, not to {int(start[-1])}")
        column, value = tensors[SPARSE[1]], tensors[SPARSE[2]]
        places = column.to(torch.int64)
        row = torch.repeat_interleave(torch.arange(rows), start.diff())
        if bool((places >= columns).any()) or bool((torch.diff(row * columns + places) <= 0).any()):
            raise InputError(f"_kept_column must rise within each row and stay below {columns}")
        if not bool(torch.isfinite(value).all()):
            raise InputError("_kept_value must be finite")
        return cls(integers, start, column, value)

    def decode_rows(self, start: int, stop: int) -> Tensor:
        return self._replaced(self.rest.decode_rows(start, stop), torch.arange(start, stop))

    def take_rows(self, index: Tensor) -> Tensor:
        check_index(index, self.shape[0])
        return self._replaced(self.rest.take_rows(index), index)

    def decode(self) -> Tensor:
        return self._replaced(self.rest.decode(), torch.arange(self.shape[0]))

    def _replaced(self, dense: Tensor, rows: Tensor) -> Tensor:
        """``dense``, the decoded integers of these rows, with their kept entries in place."""
        begin, count = self.start[rows], self.start.diff()[rows]
        line = torch.repeat_interleave(torch.arange(len(rows)), count)
        place = torch.arange(len(line)) - torch.repeat_interleave(count.cumsum(0) - count, count)
        place += torch.repeat_interleave(begin, count)
        column = self.column.view(torch.int16)[place].view(torch.uint16).to(torch.int64)
        dense[line, column] = self.value[place].float()
        return dense


def starts(count: Tensor) -> Tensor:
    """``count`` [rows] -> where each row begins, and the end: int64 [rows + 1]."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), count.to(torch.int64).cumsum(0)])


def scattered_layout(grid: Grid, rows: int, columns: int, count: int) -> Layout:
    """Suffix -> (dtype, shape) of a form that keeps ``count`` entries, with the rest on ``grid``."""
    shapes = ((torch.uint16, (rows,)), (torch.uint16, (count,)), (torch.float16, (count,)))
    sparse: Layout = dict(zip(SPARSE, shapes, strict=True))
    return integer_layout(grid, rows, columns) | sparse


def check_width(columns: int) -> None:
    if columns > WIDEST:
        raise InputError(
            f"kept entries name their columns in 16 bits: a row has at most {WIDEST} columns, not {columns}"
        )
