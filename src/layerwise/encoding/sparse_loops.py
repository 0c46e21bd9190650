"""Compiled loops over sparse weights: the grid of kept values, nearest codes, and pruning with error feedback.

Import it inside the function that needs it, as with ``encoding.loops``, whose rules hold here too: no fast-math, no
threads, additions in the written order, the interpreter's lock released.

Shapes: m rows, n columns; a signed grid has ``levels`` magnitudes ``(floor + 0 .. levels - 1) * step`` of either sign,
the code of a negative one being ``levels`` higher.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]

STARTS = (1.0, 0.8, 0.6)  # shares of the range of magnitudes that the first grid of a search spans
ROUNDS = 8  # Lloyd iterations from each start
LARGEST_FLOOR = 15.0  # in steps: what eight bits in sixteenths hold, with room for rounding the step


@njit(cache=True, nogil=True, inline="always")  # type: ignore[untyped-decorator]
def nearest_magnitude(value: float, step: float, floor: float, levels: int) -> int:
    """m of the magnitude nearest to ``value >= 0``."""
    return int(min(max(np.rint(value / step - floor), 0.0), levels - 1.0))


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def fit_magnitudes(
    weight: Array, kept: Array, importance: Array, width: int, levels: int, low: Array, step: Array
) -> None:
    """The levels ``low + m step`` that fit ``|w|`` of each group's kept entries best; fills low, step [m, groups].

    weight [m, n] float32, kept [m, n] bool, importance [n] float64; low and step float64, 0 for an empty group.
    With one level ``low`` is the mean and ``step`` is 0.
    """
    rows, columns = weight.shape
    value = np.empty(width)
    cost = np.empty(width)
    for i in range(rows):
        for g in range(low.shape[1]):
            count = 0
            smallest = np.inf
            largest = 0.0
            for j in range(g * width, min((g + 1) * width, columns)):
                if kept[i, j]:
                    value[count] = abs(np.float64(weight[i, j]))
                    cost[count] = importance[j]
                    smallest = min(smallest, value[count])
                    largest = max(largest, value[count])
                    count += 1
            best = np.inf
            best_low = 0.0
            best_step = 0.0
            if count == 0 or largest == 0.0:
                low[i, g] = 0.0
                step[i, g] = 0.0
                continue
            for start in STARTS:
                s = (largest - smallest) * start / levels
                a = smallest + s / 2
                for _ in range(ROUNDS):
                    total = 0.0
                    mean_m = 0.0
                    mean_v = 0.0
                    mean_mm = 0.0
                    mean_mv = 0.0
                    for k in range(count):
                        m = 0.0
                        if s > 0.0:
                            m = min(max(np.rint((value[k] - a) / s), 0.0), levels - 1.0)
                        total += cost[k]
                        mean_m += cost[k] * m
                        mean_v += cost[k] * value[k]
                        mean_mm += cost[k] * m * m
                        mean_mv += cost[k] * m * value[k]
                    spread = mean_mm - mean_m * mean_m / total
                    if spread <= 1e-9 * total:
                        # All entries of one level: its place is known, the step to the unused ones is not.
                        s = 0.0 if mean_m == 0.0 else s
                        a = (mean_v - s * mean_m) / total
                        break
                    s = (mean_mv - mean_m * mean_v / total) / spread
                    a = (mean_v - s * mean_m) / total
                    if a < 0.0:
                        a = 0.0
                        s = mean_mv / mean_mm
                if a < 0.0:
                    a = 0.0
                if levels > 1:
                    s = max(s, a / LARGEST_FLOOR)
                error = 0.0
                for k in range(count):
                    m = 0.0
                    if s > 0.0:
                        m = min(max(np.rint((value[k] - a) / s), 0.0), levels - 1.0)
                    d = value[k] - a - m * s
                    error += cost[k] * d * d
                if error < best:
                    best = error
                    best_low = a
                    best_step = s
            low[i, g] = best_low
            step[i, g] = best_step


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def nearest_signed_codes(weight: Array, step: Array, floor: Array, group_of: Array, levels: int, codes: Array) -> None:
    """Codes of the nearest points of a signed grid: fills ``codes`` [m, n] uint8; step and floor [m, groups]."""
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            g = group_of[j]
            w = np.float64(weight[i, j])
            m = nearest_magnitude(abs(w), np.float64(step[i, g]), np.float64(floor[i, g]), levels)
            codes[i, j] = np.uint8(m + levels if w < 0.0 else m)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def place_signed_codes(
    codes: Array, mask: Array, step: Array, floor: Array, width: int, levels: int, out: Array
) -> None:
    """What codes stand for, at their places: codes [kept] uint8 in row order -> out [m, n] float32, 0 elsewhere.

    mask [m, n] bool; step and floor [m, groups] float32, ``width`` columns to a group.
    """
    at = 0
    for i in range(mask.shape[0]):
        for j in range(mask.shape[1]):
            value = np.float32(0.0)
            if mask[i, j]:
                g = j // width
                code = np.int64(codes[at])
                at += 1
                m = code - levels if code >= levels else code
                value = (np.float32(m) + floor[i, g]) * step[i, g]
                if code >= levels:
                    value = -value
            out[i, j] = value


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def prune_columns(
    current: Array,
    kept: Array,
    upper: Array,
    first: int,
    fours: bool,
    limit: float,
    levels: int,
    step: Array,
    floor: Array,
    group_of: Array,
    codes: Array,
    errors: Array,
) -> None:
    """Prune, and round if ``levels > 0``, one block of columns, each passing its error to those on its right.

    Everything is transposed, columns first, so that the rows of a column are neighbours in memory:
    current [n, m] float64: the weights as updated so far; the block's own end as what is stored.
    kept [n, m] bool: given for the block, or, with ``fours``, chosen here as each four columns are entered.
    limit: what no kept value may exceed in size, for values that are not on a grid.
    upper [width, width] float64: the block's own part of U, the upper Cholesky factor of the inverse of H.
    step, floor [groups, m] float32; codes [n, m] uint8; errors [width, m] float64: e, filled.
    """
    width, rows = errors.shape
    for b in range(width):
        j = first + b
        if fours and b % 4 == 0:
            run = min(4, width - b)
            for i in range(rows):
                for k in range(run):
                    # Stays if fewer than two of its run have a higher score, or an equal one further left.
                    score = current[j + k, i] ** 2 / upper[b + k, b + k] ** 2
                    above = 0
                    for other in range(run):
                        rival = current[j + other, i] ** 2 / upper[b + other, b + other] ** 2
                        if rival > score or (rival == score and other < k):
                            above += 1
                    kept[j + k, i] = above < 2
        for i in range(rows):
            w = current[j, i]
            stored = 0.0
            if kept[j, i]:
                stored = min(max(w, -limit), limit)
                if levels > 0:
                    g = group_of[j]
                    m = nearest_magnitude(abs(w), np.float64(step[g, i]), np.float64(floor[g, i]), levels)
                    stored = np.float64((np.float32(m) + floor[g, i]) * step[g, i])
                    codes[j, i] = np.uint8(m)
                    if w < 0.0:
                        stored = -stored
                        codes[j, i] = np.uint8(m + levels)
            errors[b, i] = (w - stored) / upper[b, b]
            current[j, i] = stored
        for k in range(b + 1, width):
            factor = upper[b, k]
            for i in range(rows):
                current[first + k, i] -= errors[b, i] * factor
