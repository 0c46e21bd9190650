"""The inner loops of encoders that round to grids of integers, from the compiled library.

Each function repeats the one of the same name in ``encoding/loops.py`` bit for bit; where the library was not built
that one runs instead (``encoding/grid_loops.py``). Arrays are whole, rows after rows, of the types given there.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerwise.kernels.library import library

Array = NDArray[Any]
FLOAT, DOUBLE, LONG, BYTE = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.int64), np.dtype(np.uint8)


def fields(text: str) -> list[tuple[str, Any]]:
    """``"rows columns: long, weight: pointer"`` as ctypes has it."""
    kinds = {"long": ctypes.c_int64, "pointer": ctypes.c_void_p, "float": ctypes.c_float, "double": ctypes.c_double}
    parts = (part.split(":") for part in text.split(","))
    return [(name, kinds[kind.strip()]) for names, kind in parts for name in names.split()]


class Candidates(ctypes.Structure):
    _fields_ = fields(
        "rows columns groups candidates width: long, weight importance step zero best: pointer, top: float"
    )


class Nearest(ctypes.Structure):
    _fields_ = fields("rows columns groups width: long, weight step zero codes: pointer, top: double")


class Tile(ctypes.Structure):
    _fields_ = fields(
        "rows width first first_row height: long, weight step zero group_of lower carried codes change: pointer, "
        "top: double"
    )


def best_candidates(
    path: str, weight: Array, importance: Array, step: Array, zero: Array, width: int, top: float, best: Array
) -> None:
    (rows, columns), (_, groups, candidates) = weight.shape, step.shape
    shapes = {(rows, groups, candidates): (step, zero), (columns,): (importance,), (rows, groups): (best,)}
    check(shapes, groups == -(-columns // width))
    arrays = ((weight, FLOAT), (importance, FLOAT), (step, FLOAT), (zero, FLOAT), (best, LONG))
    call("best", path, Candidates(rows, columns, groups, candidates, width, *map(pointer, arrays), top))


def nearest_codes(path: str, weight: Array, step: Array, zero: Array, width: int, top: float, codes: Array) -> None:
    (rows, columns), groups = weight.shape, step.shape[1]
    check({(rows, groups): (step, zero), (rows, columns): (codes,)}, groups == -(-columns // width))
    arrays = ((weight, FLOAT), (step, FLOAT), (zero, FLOAT), (codes, BYTE))
    call("nearest", path, Nearest(rows, columns, groups, width, *map(pointer, arrays), top))


def round_columns(
    path: str,
    weight: Array,
    step: Array,
    zero: Array,
    group_of: Array,
    top: float,
    lower: Array,
    first: int,
    first_row: int,
    height: int,
    carried: Array,
    codes: Array,
    change: Array,
) -> None:
    (columns, rows), width = weight.shape, carried.shape[0]
    inside = 0 <= first <= columns - width and 0 <= first_row <= rows - height
    shapes: dict[tuple[int, ...], tuple[Array, ...]] = {
        (len(step), rows): (step, zero), (columns,): (group_of,), (width, rows): (carried,),
    }  # fmt: skip
    check(shapes | {(columns, rows): (codes, change)}, inside and lower.shape == (width, width))
    arrays = (
        (weight, FLOAT), (step, FLOAT), (zero, FLOAT), (group_of, LONG), (lower, DOUBLE), (carried, DOUBLE),
        (codes, BYTE), (change, DOUBLE),
    )  # fmt: skip
    call("columns", path, Tile(rows, width, first, first_row, height, *map(pointer, arrays), top))


def check(shapes: dict[tuple[int, ...], tuple[Array, ...]], fits: bool) -> None:
    """The library believes what it is told."""
    if not fits or any(array.shape != shape for shape, arrays in shapes.items() for array in arrays):
        raise ValueError("arrays of an encoder's loop do not fit together")


def pointer(given: tuple[Array, Any]) -> int:
    array, dtype = given
    if array.dtype != dtype or not array.flags.c_contiguous:
        raise ValueError(f"an encoder's loop takes whole arrays of {dtype}, not {array.dtype} {array.strides}")
    return array.ctypes.data


def call(name: str, path: str, given: ctypes.Structure) -> None:
    function = getattr(library(), f"layerwise_{name}")
    if function(ctypes.byref(given), ctypes.sizeof(given), path.encode()):
        raise RuntimeError(f"the compiled library has no path {path!r} for {name}")
