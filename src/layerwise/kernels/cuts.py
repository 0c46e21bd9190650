"""The inner loops of cutting weights to a trellis, from the compiled library.

Each function repeats the one of the same name in ``encoding/trellis_loops.py`` bit for bit; where the library was not
built that one runs instead (``encoding/grid_loops.py``).
"""

from __future__ import annotations

import ctypes
from typing import Any

from numpy.typing import NDArray

from layerwise.kernels.grids import BYTE, DOUBLE, FLOAT, LONG, call, check, fields, pointer

Array = NDArray[Any]
STATES = 256
MOST_BITS = 5


class Cut(ctypes.Structure):
    _fields_ = fields(
        "rows width first first_row height bits coupled: long, "
        "weight scales group_of table lower carried states change pivots lower_rows below absorbed: pointer"
    )


class Recut(ctypes.Structure):
    _fields_ = fields(
        "rows width first first_row height bits: long, weight scales group_of table curvature pull states change "
        "row_curvature slope: pointer"
    )


def cut_tile(
    path: str, weight: Array, scales: Array, group_of: Array, table: Array, bits: int, lower: Array, first: int,
    first_row: int, height: int, carried: Array, states: Array, change: Array, coupled: bool, pivots: Array,
    lower_rows: Array, below: Array, absorbed: Array,
) -> None:  # fmt: skip
    (columns, rows), width = weight.shape, carried.shape[0]
    inside = 0 <= first <= columns - width and 0 <= first_row <= rows - height and 1 <= bits <= MOST_BITS
    fits = inside and scales.shape == (len(scales), rows) and carried.shape == (width, rows)
    fits &= lower.shape == (width, width) and pivots.shape == (height,) and table.shape == (STATES,)
    if coupled:
        fits &= lower_rows.shape == (height, height) and below.shape == (width, height)
        fits &= absorbed.shape == (width, rows)
    check({(columns,): (group_of,), (columns, rows): (states, change)}, fits)
    arrays = (
        (weight, FLOAT), (scales, FLOAT), (group_of, LONG), (table, FLOAT), (lower, DOUBLE), (carried, DOUBLE),
        (states, BYTE), (change, DOUBLE), (pivots, DOUBLE), (lower_rows, DOUBLE), (below, DOUBLE), (absorbed, DOUBLE),
    )  # fmt: skip
    call("cut", path, Cut(rows, width, first, first_row, height, bits, int(coupled), *map(pointer, arrays)))


def recut_tile(
    path: str, weight: Array, scales: Array, group_of: Array, table: Array, bits: int, curvature: Array, first: int,
    first_row: int, height: int, pull: Array, states: Array, change: Array, row_curvature: Array, slope: Array,
) -> None:  # fmt: skip
    (columns, rows), width = weight.shape, pull.shape[0]
    inside = 0 <= first <= columns - width and 0 <= first_row <= rows - height and 1 <= bits <= MOST_BITS
    fits = inside and scales.shape == (len(scales), rows) and pull.shape == (width, rows)
    fits &= curvature.shape == (width, width) and row_curvature.shape == (height, height)
    fits &= slope.shape == (width, height) and table.shape == (STATES,)
    check({(columns,): (group_of,), (columns, rows): (states, change)}, fits)
    arrays = (
        (weight, FLOAT), (scales, FLOAT), (group_of, LONG), (table, FLOAT), (curvature, DOUBLE), (pull, DOUBLE),
        (states, BYTE), (change, DOUBLE), (row_curvature, DOUBLE), (slope, DOUBLE),
    )  # fmt: skip
    call("recut", path, Recut(rows, width, first, first_row, height, bits, *map(pointer, arrays)))
