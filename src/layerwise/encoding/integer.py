"""Form ``integer``: group-wise integers of 2 to 8 bits.

=================  =========================================  =================================================
stored tensor      type and shape                             holds
=================  =========================================  =================================================
``""``             uint8 [rows * row_bytes(columns, bits)]    packed codes, see ``bitplanes``
``_scale``         fp16 or uint8 [rows, groups]               steps, or their codes 1..255
``_scale_factor``  fp16 [rows]                                only with 8-bit scales: step = code * factor; with
                                                              ``float_scale`` fp16 [1], a power of two: step =
                                                              e4m3(code) * factor, codes 1..126
``_zero``          uint8 [rows * row_bytes(groups, bits)]     packed zero codes; fp16 [rows, groups] with a float
                                                              zero; absent when symmetric
=================  =========================================  =================================================

``decode`` is ``(code - zero) * step`` in float32, the same on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerwise.encoding.bitplanes import LAYOUT_VERSION, pack, row_bytes, unpack
from layerwise.encoding.encoded import Layout, PackedRows
from layerwise.encoding.float8 import TOP_CODE
from layerwise.encoding.grid import FittedGrid, Grid, points
from layerwise.errors import InputError

LONGEST_SIDE = 2**40  # a longer side in a file is damage, not a matrix


@dataclass(frozen=True, eq=False)
class GroupedInteger(PackedRows):
    """Packed codes ``[rows, row_bytes]`` uint8 and the grid that they count on."""

    form: ClassVar[str] = "integer"
    packed: Tensor
    fitted: FittedGrid

    @staticmethod
    def from_codes(codes: Tensor, fitted: FittedGrid) -> GroupedInteger:
        """Pack ``codes`` [rows, columns] uint8, each at most ``fitted.grid.top``."""
        return GroupedInteger(pack(codes, fitted.grid.bits), fitted)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.packed.shape[0], self.fitted.columns

    @property
    def grid(self) -> Grid:
        return self.fitted.grid

    def codes(self) -> Tensor:
        """All codes, unpacked: uint8 [rows, columns]."""
        return unpack(self.packed, self.fitted.columns, self.grid.bits)

    def tensors(self) -> dict[str, Tensor]:
        stored = {"": self.packed.reshape(-1), "_scale": self.fitted.scale}
        if self.fitted.factor is not None:
            stored["_scale_factor"] = self.fitted.factor
        if self.fitted.zero is not None:
            zero = self.fitted.zero
            stored["_zero"] = zero if self.grid.float_zero else pack(zero, self.grid.bits).reshape(-1)
        return stored

    def spec(self) -> dict[str, Any]:
        return integer_spec(self.grid, *self.shape)

    @classmethod
    def restore(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GroupedInteger:
        rows, columns = stored_shape(spec)
        check_version(spec, "codes")
        names = ("bits", "group", "symmetric", "scale_bits", "float_zero")
        missing = [name for name in names if name not in spec]
        if missing:
            raise InputError(f"the description of an integer form lacks {', '.join(missing)}")
        grid = Grid(**{name: spec[name] for name in names}, float_scale=spec.get("float_scale", False))
        check_tensors(integer_layout(grid, rows, columns), tensors)

        scale, factor, zero = tensors["_scale"], tensors.get("_scale_factor"), tensors.get("_zero")
        check_steps(tensors, "an integer form")
        if factor is not None and grid.float_scale:
            check_float8(scale, factor)
        if zero is not None and not grid.float_zero:
            groups = grid.groups(columns)
            zero = unpack(zero.view(rows, row_bytes(groups, grid.bits)), groups, grid.bits)
        elif zero is not None and not bool(torch.isfinite(zero).all()):
            raise InputError("_zero of an integer form must be finite")
        packed = tensors[""].view(rows, row_bytes(columns, grid.bits))
        return cls(packed, FittedGrid(grid, columns, scale, factor, zero))

    def _decode(self, rows: slice | Tensor) -> Tensor:
        codes = unpack(self.packed[rows], self.fitted.columns, self.grid.bits)
        return points(codes, self.fitted.select(rows))


def integer_spec(grid: Grid, rows: int, columns: int) -> dict[str, Any]:
    """The spec of an integer form of this shape."""
    return {
        "form": GroupedInteger.form,
        "layout": LAYOUT_VERSION,
        "shape": [rows, columns],
        "bits": grid.bits,
        "group": grid.group,
        "symmetric": grid.symmetric,
        "scale_bits": grid.scale_bits,
        "float_zero": grid.float_zero,
        **({"float_scale": True} if grid.float_scale else {}),
    }


def integer_layout(grid: Grid, rows: int, columns: int) -> Layout:
    """Suffix -> (dtype, shape) of every tensor of an integer form of this shape."""
    groups = grid.groups(columns)
    small = grid.scale_bits == 8
    layout: Layout = {
        "": (torch.uint8, (rows * row_bytes(columns, grid.bits),)),
        "_scale": (torch.uint8 if small else torch.float16, (rows, groups)),
    }
    if small:
        layout["_scale_factor"] = (torch.float16, (1 if grid.float_scale else rows,))
    if grid.float_zero:
        layout["_zero"] = (torch.float16, (rows, groups))
    elif not grid.symmetric:
        layout["_zero"] = (torch.uint8, (rows * row_bytes(groups, grid.bits),))
    return layout


def stored_shape(spec: Mapping[str, Any]) -> tuple[int, int]:
    """``spec["shape"]`` as (rows, columns); raises ``InputError`` unless it is two sensible whole numbers."""
    shape = spec.get("shape")
    if (
        not isinstance(shape, (list, tuple))
        or len(shape) != 2
        or any(type(side) is not int or not 1 <= side <= LONGEST_SIDE for side in shape)
    ):
        raise InputError(f"the shape of a stored weight must be two positive whole numbers, not {shape!r}")
    return shape[0], shape[1]


def check_version(spec: Mapping[str, Any], what: str) -> None:
    """Refuse a layout of another version than ours; ``what`` is said to be in it."""
    version = spec.get("layout")
    if type(version) is not int or version != LAYOUT_VERSION:
        raise InputError(f"the {what} are in layout {version!r}; this version reads layout {LAYOUT_VERSION}")


def check_steps(tensors: Mapping[str, Tensor], form: str) -> None:
    """Refuse scales that no fitting makes."""
    for suffix in ("_scale", "_scale_factor"):
        steps = tensors.get(suffix)
        if steps is not None and not bool((torch.isfinite(steps) & (steps > 0)).all()):
            raise InputError(f"{suffix} of {form} must be positive and finite")


def check_float8(scale: Tensor, power: Tensor) -> None:
    """Refuse 8-bit floats that are no positive number, and a factor that is no power of two."""
    if bool((scale > TOP_CODE).any()):
        raise InputError(f"_scale of an integer form with float_scale holds codes 1 to {TOP_CODE}")
    if not bool((torch.frexp(power.float()).mantissa == 0.5).all()):
        raise InputError("_scale_factor of an integer form with float_scale must be a power of two")


def check_tensors(layout: Layout, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not exactly those of ``layout``."""
    if set(tensors) != set(layout):
        raise InputError(f"a stored weight needs the tensors {sorted(layout)}, but has {sorted(tensors)}")
    for suffix, (dtype, shape) in layout.items():
        tensor = tensors[suffix]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise InputError(
                f"stored tensor {suffix!r} must be {str(dtype).removeprefix('torch.')} {list(shape)}, "
                f"not {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            )
