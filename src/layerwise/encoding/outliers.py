"""Form ``outliers``: a few entries of each row in fp16, the rest as group-wise integers.

=====================  ==============================  ==========================================================
stored tensor          type and shape                  holds
=====================  ==============================  ==========================================================
``""``, ``_scale``, …  as in the form ``integer``      all entries; those that are outliers have a code to spare
``_outlier_column``    uint16 [rows, count]            columns of the outliers, rising within a row
``_outlier_value``     fp16 [rows, count]              what these entries are
=====================  ==============================  ==========================================================

Every row has ``count`` outliers, so that the bytes follow from the shape: ``32 count / columns`` bits a weight more
than the integers alone, where a mask would cost a whole bit. An outlier *replaces* what the integers say, so it decodes
to its fp16 value exactly. (A product that wants a sum stores nothing new: it subtracts the integers at the outliers
once, on loading.) The outlier's code is that of zero, or the nearest to it, and its group's range is the others'.
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

WIDEST = 2**16  # columns that sixteen bits can tell apart
SPARSE = ("_outlier_column", "_outlier_value")


@dataclass(frozen=True, eq=False)
class Outliers(Encoded):
    """``rest`` with the entries at ``column`` [rows, count] uint16 replaced by ``value`` [rows, count] fp16."""

    form: ClassVar[str] = "outliers"
    rest: GroupedInteger
    column: Tensor
    value: Tensor

    @staticmethod
    def of(weight: Tensor, column: Tensor, rest: GroupedInteger) -> Outliers:
        """Keep the entries of ``weight`` [rows, columns] at ``column`` [rows, count] int64, in any order.

        Raises ``InputError`` for a row too wide or a value that fp16 cannot hold, ``ValueError`` for a column twice.
        """
        check_width(weight.shape[1])
        column = column.sort(dim=1).values
        if bool((column[:, 1:] == column[:, :-1]).any()):
            raise ValueError("a column is named twice among the outliers of a row")
        value = weight.detach().gather(1, column).half()
        if not bool(torch.isfinite(value).all()):
            raise InputError("the weight holds outliers that float16 cannot hold (too large, NaN or infinity)")
        return Outliers(rest, column.to(torch.uint16), value)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.rest.shape

    def tensors(self) -> dict[str, Tensor]:
        return self.rest.tensors() | dict(zip(SPARSE, (self.column, self.value), strict=True))

    def spec(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "layout": LAYOUT_VERSION,
            "shape": list(self.shape),
            "count": self.column.shape[1],
            "rest": self.rest.spec(),
        }

    @classmethod
    def restore(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Outliers:
        rows, columns = stored_shape(spec)
        check_version(spec, "outliers")
        count, rest = spec.get("count"), spec.get("rest")
        check_width(columns)
        if type(count) is not int or not 1 <= count <= columns:
            raise InputError(f"a row of {columns} columns has 1 to {columns} outliers, not {count!r}")
        if not isinstance(rest, Mapping) or rest.get("form") != GroupedInteger.form:
            raise InputError("what is not an outlier is described under rest, as the form integer")
        if stored_shape(rest) != (rows, columns):
            raise InputError(f"the outliers belong to a {rows} x {columns} matrix, the rest does not")
        dense = {suffix: tensor for suffix, tensor in tensors.items() if suffix not in SPARSE}
        integers = GroupedInteger.restore(rest, dense)
        check_tensors(outliers_layout(integers.grid, rows, columns, count), tensors)
        column, value = (tensors[suffix] for suffix in SPARSE)
        places = column.to(torch.int64)
        if bool((places >= columns).any()) or bool((places[:, 1:] <= places[:, :-1]).any()):
            raise InputError(f"_outlier_column must rise within each row and stay below {columns}")
        if not bool(torch.isfinite(value).all()):
            raise InputError("_outlier_value must be finite")
        return cls(integers, column, value)

    def decode_rows(self, start: int, stop: int) -> Tensor:
        column = self.column[start:stop].to(torch.int64)
        return self.rest.decode_rows(start, stop).scatter_(1, column, self.value[start:stop].float())

    def take_rows(self, index: Tensor) -> Tensor:
        check_index(index, self.shape[0])
        column = self.column.view(torch.int16)[index].view(torch.uint16).to(torch.int64)
        return self.rest.take_rows(index).scatter_(1, column, self.value[index].float())

    def decode(self) -> Tensor:
        return self.rest.decode().scatter_(1, self.column.to(torch.int64), self.value.float())


def outliers_layout(grid: Grid, rows: int, columns: int, count: int) -> Layout:
    """Suffix -> (dtype, shape) of a form with ``count`` outliers a row and the rest on ``grid``."""
    sparse: Layout = {SPARSE[0]: (torch.uint16, (rows, count)), SPARSE[1]: (torch.float16, (rows, count))}
    return integer_layout(grid, rows, columns) | sparse


def check_width(columns: int) -> None:
    if columns > WIDEST:
        raise InputError(f"outliers name their columns in 16 bits: a row has at most {WIDEST} columns, not {columns}")
