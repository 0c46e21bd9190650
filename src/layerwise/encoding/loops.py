"""Compiled loops over weights: nearest codes, the clip search, rounding with error feedback, and its revision.

They live in one file because the compiler's cache watches only the file of the function it stores. Import it inside
the function that needs it: loading the compiler takes longer than listing every technique.

No fast-math and no threads: additions happen in the written order, so a machine type always gives the same codes. The
global interpreter lock is released, so several sites can be encoded from several threads.

Shapes: m rows, n columns; ``step`` and ``zero`` are [m, groups] float32; ``group_of`` [n] int64 names the group of a
column; ``top`` is the largest code. ``decode = step * (code - zero)`` is formed in float32, as the stored form does.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]

ROUND_64 = 6755399441055744.0  # 1.5 * 2**52: adding and subtracting it rounds a float64 to the nearest even integer
ROUND_32 = np.float32(12582912.0)  # 1.5 * 2**23: the same for float32


@njit(cache=True, nogil=True, inline="always")  # type: ignore[untyped-decorator]
def nearest_code(value: float, step: float, zero: float, top: float) -> float:
    """clip(round(value / step) + zero, 0, top); ``zero`` is a whole number."""
    level = min(max(value / step, -1.0 - zero), top + 1.0 - zero)
    return min(max((level + ROUND_64) - ROUND_64 + zero, 0.0), top)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def nearest_codes(weight: Array, step: Array, zero: Array, group_of: Array, top: float, codes: Array) -> None:
    """Codes of the nearest points of an integer-zero grid: fills ``codes`` [m, n] uint8."""
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            g = group_of[j]
            codes[i, j] = np.uint8(
                nearest_code(np.float64(weight[i, j]), np.float64(step[i, g]), np.float64(zero[i, g]), top)
            )


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def nearest_codes_float_zero(
    weight: Array, step: Array, zero: Array, group_of: Array, top: float, codes: Array
) -> None:
    """As ``nearest_codes`` for a real zero, which is added before rounding."""
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            g = group_of[j]
            level = np.float64(weight[i, j]) / np.float64(step[i, g]) + np.float64(zero[i, g])
            codes[i, j] = np.uint8((min(max(level, 0.0), top) + ROUND_64) - ROUND_64)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def best_candidates(
    weight: Array, importance: Array, step: Array, zero: Array, width: int, top: float, best: Array
) -> None:
    """Which of the candidate grids rounds each group with the least ``sum importance * (w - w')**2``.

    weight [m, n] float32, importance [n] float32, step and zero [m, groups, candidates] float32 -> best [m, groups]
    int64, the first of equals. The candidates are the inner loop, because they are independent sums.
    """
    rows, columns = weight.shape
    candidates = step.shape[2]
    inverse = np.empty(candidates, np.float32)
    error = np.empty(candidates, np.float32)
    high = np.float32(top)
    low = np.float32(0.0)
    for i in range(rows):
        for g in range(step.shape[1]):
            for k in range(candidates):
                inverse[k] = np.float32(1.0) / step[i, g, k]
                error[k] = np.float32(0.0)
            for j in range(g * width, min((g + 1) * width, columns)):
                w = weight[i, j]
                h = importance[j]
                for k in range(candidates):
                    z = zero[i, g, k]
                    code = (w * inverse[k] + ROUND_32) - ROUND_32 + z
                    code = min(max(code, low), high)
                    d = w - (code - z) * step[i, g, k]
                    error[k] += h * d * d
            least = 0
            for k in range(1, candidates):
                if error[k] < error[least]:
                    least = k
            best[i, g] = least


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def round_columns(
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
    """Round one tile, last column first, each column absorbing the errors of those on its right.

    Everything is transposed, columns first, so that the rows of a column are neighbours in memory:
    weight [n, m] float32, step and zero [groups, m] float32, codes [n, m] uint8, change [n, m] float64 (D = W' - W).
    lower   [width, width] float64: the tile's own part of the unit lower triangular factor of C.
    carried [width, m] float64: E, sum over l > j of D[i, l] L[l, j] with l right of the tile; updated in place.
    The tile is columns ``first .. first + width`` of rows ``first_row .. first_row + height``.
    """
    width = carried.shape[0]
    for b in range(width - 1, -1, -1):
        j = first + b
        g = group_of[j]
        for i in range(first_row, first_row + height):
            s = step[g, i]
            z = zero[g, i]
            w = np.float64(weight[j, i])
            code = nearest_code(w - carried[b, i], np.float64(s), np.float64(z), top)
            codes[j, i] = np.uint8(code)
            change[j, i] = np.float64(s * (np.float32(code) - z)) - w
        for k in range(b):
            factor = lower[b, k]
            for i in range(first_row, first_row + height):
                carried[k, i] += change[j, i] * factor


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def round_tile(
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
    lower_rows: Array,
    below: Array,
    absorbed: Array,
) -> None:
    """As ``round_columns``, and in a column last row first, each row absorbing the errors of those below it.

    lower_rows [height, height] float64: the tile's own part of the unit lower triangular factor of R.
    below      [width, height] float64: F, what the rows under the tile send into it; updated in place.
    absorbed   [width, m] float64: C = D + E, filled for the tile's rows.
    """
    width = carried.shape[0]
    for b in range(width - 1, -1, -1):
        j = first + b
        g = group_of[j]
        for a in range(height - 1, -1, -1):
            i = first_row + a
            s = step[g, i]
            z = zero[g, i]
            w = np.float64(weight[j, i])
            code = nearest_code(w - carried[b, i] - below[b, a], np.float64(s), np.float64(z), top)
            d = np.float64(s * (np.float32(code) - z)) - w
            codes[j, i] = np.uint8(code)
            change[j, i] = d
            c = d + carried[b, i]
            absorbed[b, i] = c
            for k in range(a):
                below[b, k] += lower_rows[a, k] * c
        for k in range(b):
            factor = lower[b, k]
            for i in range(first_row, first_row + height):
                carried[k, i] += change[j, i] * factor


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def revise_columns(
    weight: Array,
    step: Array,
    zero: Array,
    group_of: Array,
    top: float,
    curvature: Array,
    first: int,
    first_row: int,
    height: int,
    pull: Array,
    codes: Array,
    change: Array,
) -> None:
    """Give each entry of a tile the code that is best while all others stay: rows do not act on each other.

    Transposed as in ``round_columns``. curvature [width, width] float64: the tile's own block of C;
    pull [width, m] float64: ``S = (D C)^T``, kept up to date inside the tile.
    """
    for b in range(pull.shape[0] - 1, -1, -1):
        j = first + b
        g = group_of[j]
        for i in range(first_row, first_row + height):
            s = step[g, i]
            z = zero[g, i]
            w = np.float64(weight[j, i])
            target = w + change[j, i] - pull[b, i] / curvature[b, b]
            code = nearest_code(target, np.float64(s), np.float64(z), top)
            if code != codes[j, i]:
                d = np.float64(s * (np.float32(code) - z)) - w
                moved = d - change[j, i]
                codes[j, i] = np.uint8(code)
                change[j, i] = d
                for k in range(b):
                    pull[k, i] += curvature[b, k] * moved


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def revise_tile(
    weight: Array,
    step: Array,
    zero: Array,
    group_of: Array,
    top: float,
    curvature: Array,
    first: int,
    first_row: int,
    height: int,
    pull: Array,
    codes: Array,
    change: Array,
    row_curvature: Array,
    slope: Array,
) -> None:
    """As ``revise_columns`` where rows act on each other through R.

    row_curvature [height, height] float64: the tile's own block of R; slope [width, height] float64: the tile of
    ``(R D C)^T``, half the derivative of ``tr(R D C D^T)``, kept up to date for the entries still to come.
    """
    for b in range(pull.shape[0] - 1, -1, -1):
        j = first + b
        g = group_of[j]
        for a in range(height - 1, -1, -1):
            i = first_row + a
            s = step[g, i]
            z = zero[g, i]
            w = np.float64(weight[j, i])
            target = w + change[j, i] - slope[b, a] / (row_curvature[a, a] * curvature[b, b])
            code = nearest_code(target, np.float64(s), np.float64(z), top)
            if code != codes[j, i]:
                d = np.float64(s * (np.float32(code) - z)) - w
                moved = d - change[j, i]
                codes[j, i] = np.uint8(code)
                change[j, i] = d
                for k in range(pull.shape[0]):
                    pull[k, i] += curvature[b, k] * moved
                for k in range(b + 1):
                    factor = curvature[b, k] * moved
                    for c in range(height):
                        slope[k, c] += factor * row_curvature[a, c]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def nearest_half(value: float) -> float:
    """The fp16 number nearest to a positive ``value``, ties to the even one; at least the smallest positive one."""
    exponent = math.frexp(value)[1] - 1
    quantum = math.ldexp(1.0, max(exponent, -14) - 10)
    return min(max((value / quantum + ROUND_64) - ROUND_64, 1.0) * quantum, 65504.0)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def fit_steps(steps: Array, factor: Array, row_curvature: Array, bend: Array, towards: Array) -> None:
    """Fit one group's steps of a tile of rows to their codes, row by row: updates ``steps`` and ``towards``.

    steps [height] float64; factor [height]: what a stored step is a whole multiple (1..255) of, 0 where it is an fp16
    number; row_curvature [height, height]: the tile's block of R; bend [height, height]: P C P^T, with P the group's
    code - zero; towards [height]: half the slope of the loss by each step, R D C . P.
    """
    height = steps.shape[0]
    for a in range(height):
        own = row_curvature[a, a] * bend[a, a]
        if own <= 0.0:
            continue
        wanted = min(max(steps[a] - towards[a] / own, 0.5 * steps[a]), 2.0 * steps[a])
        if factor[a] > 0.0:
            whole = (wanted / factor[a] + ROUND_64) - ROUND_64
            wanted = factor[a] * min(max(whole, 1.0), 255.0)
        else:
            wanted = nearest_half(wanted)
        moved = wanted - steps[a]
        if moved * (2.0 * towards[a] + own * moved) >= 0.0:
            continue
        steps[a] = wanted
        for c in range(height):
            towards[c] += row_curvature[c, a] * bend[c, a] * moved
