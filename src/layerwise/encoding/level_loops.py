"""Compiled loops for values that lie on no even grid: nearest levels, rounding with error feedback, trit planes.

As in ``loops``: no fast-math and no threads, so a machine type always gives the same codes, and the interpreter lock is
released. Levels ascend; ties go to the lower one; places that a group does not have are +infinity.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]


@njit(cache=True, nogil=True, inline="always")  # type: ignore[untyped-decorator]
def nearest_level(value: float, levels: Array) -> int:
    """Place of the nearest of ``levels`` [L], by halving."""
    low = 0
    high = levels.shape[0] - 1
    while low < high:
        middle = (low + high) // 2
        if value > 0.5 * (np.float64(levels[middle]) + np.float64(levels[middle + 1])):
            low = middle + 1
        else:
            high = middle
    return low


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def nearest_places(weight: Array, levels: Array, group_of: Array, codes: Array) -> None:
    """Place of the nearest level of every weight.

    weight [m, n] float32, levels [m, groups, L] float32, group_of [n] int64 -> codes [m, n] uint8.
    """
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            codes[i, j] = np.uint8(nearest_level(np.float64(weight[i, j]), levels[i, group_of[j]]))


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def scale_errors(weight: Array, importance: Array, levels: Array, scales: Array, width: int, errors: Array) -> None:
    """``sum importance (w - s level)^2`` of every group at every candidate scale s, with nearest levels.

    weight [m, n] float32, importance [n] float32, levels [L] float32, scales [m, groups, K] float32 -> errors
    [m, groups, K] float64. A scale of zero makes zeros.
    """
    rows, columns = weight.shape
    for i in range(rows):
        for g in range(scales.shape[1]):
            for k in range(scales.shape[2]):
                scale = np.float64(scales[i, g, k])
                total = 0.0
                for j in range(g * width, min((g + 1) * width, columns)):
                    w = np.float64(weight[i, j])
                    d = w
                    if scale > 0:
                        d = w - scale * np.float64(levels[nearest_level(w / scale, levels)])
                    total += np.float64(importance[j]) * d * d
                errors[i, g, k] = total


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def place_tile(
    weight: Array,
    levels: Array,
    group_of: Array,
    lower: Array,
    first: int,
    first_row: int,
    height: int,
    carried: Array,
    codes: Array,
    change: Array,
    coupled: bool,
    lower_rows: Array,
    below: Array,
    absorbed: Array,
) -> None:
    """One tile of the first pass, as ``loops.round_tile``; ``coupled`` says whether rows act on each other.

    Transposed: weight [n, m] float32, levels [groups, m, L] float32, codes [n, m] uint8, change [n, m] float64.
    lower [width, width], carried [width, m], lower_rows [height, height], below [width, height], absorbed [width, m]
    float64 mean what they mean there; the last three are not read where rows are not coupled.
    """
    width = carried.shape[0]
    for b in range(width - 1, -1, -1):
        j = first + b
        g = group_of[j]
        for a in range(height - 1, -1, -1):
            i = first_row + a
            w = np.float64(weight[j, i])
            value = w - carried[b, i]
            if coupled:
                value -= below[b, a]
            code = nearest_level(value, levels[g, i])
            d = np.float64(levels[g, i, code]) - w
            codes[j, i] = np.uint8(code)
            change[j, i] = d
            if coupled:
                c = d + carried[b, i]
                absorbed[b, i] = c
                for k in range(a):
                    below[b, k] += lower_rows[a, k] * c
        for k in range(b):
            factor = lower[b, k]
            for i in range(first_row, first_row + height):
                carried[k, i] += change[j, i] * factor


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def move_tile(
    weight: Array,
    levels: Array,
    group_of: Array,
    curvature: Array,
    first: int,
    first_row: int,
    height: int,
    pull: Array,
    codes: Array,
    change: Array,
    coupled: bool,
    row_curvature: Array,
    slope: Array,
) -> None:
    """One tile of a sweep, as ``loops.revise_tile``: each entry takes the level that is best while all others stay.

    curvature [width, width], pull [width, m], row_curvature [height, height], slope [width, height] float64 as there;
    the last two are not read where rows are not coupled.
    """
    for b in range(pull.shape[0] - 1, -1, -1):
        j = first + b
        g = group_of[j]
        for a in range(height - 1, -1, -1):
            i = first_row + a
            w = np.float64(weight[j, i])
            if coupled:
                value = w + change[j, i] - slope[b, a] / (row_curvature[a, a] * curvature[b, b])
            else:
                value = w + change[j, i] - pull[b, i] / curvature[b, b]
            code = nearest_level(value, levels[g, i])
            if code != codes[j, i]:
                d = np.float64(levels[g, i, code]) - w
                moved = d - change[j, i]
                codes[j, i] = np.uint8(code)
                change[j, i] = d
                for k in range(pull.shape[0]):
                    pull[k, i] += curvature[b, k] * moved
                if coupled:
                    for k in range(b + 1):
                        factor = curvature[b, k] * moved
                        for c in range(height):
                            slope[k, c] += factor * row_curvature[a, c]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def nearest_pair(value: float, first: float, second: float) -> int:
    """Place of (t1, t2) among the nine pairs in lexicographic order, whose sum is nearest; the first of equals."""
    best = 0
    least = np.inf
    for c in range(9):
        d = value - (c // 3 - 1) * first - (c % 3 - 1) * second
        if d * d < least:
            least = d * d
            best = c
    return best


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def two_planes(
    weight: Array, importance: Array, start: Array, rounds: int, limit: float, ridge: float, scales: Array, trace: Array
) -> None:
    """Two scaled trit planes for each group, from given trits: scales by ridge regression, trits by nearest pair.

    weight, importance [groups, width] float64; start [groups, width] uint8, a place among the nine pairs. Fills scales
    [groups, 2] with the best pair of scales met, and trace [groups, 2 * rounds] with the objective ``sum importance
    (w - a.t)^2`` after every half-step (the last value repeated once it has settled).
    ridge is raised tenfold, up to 1, while the 2 x 2 system's condition is above ``limit``.
    """
    groups, width = weight.shape
    pairs = np.empty(width, np.int64)
    for g in range(groups):
        for j in range(width):
            pairs[j] = start[g, j]
        best = np.inf
        first = 0.0
        second = 0.0
        for step in range(rounds):
            s11 = 0.0
            s12 = 0.0
            s22 = 0.0
            b1 = 0.0
            b2 = 0.0
            for j in range(width):
                h = importance[g, j]
                t1 = pairs[j] // 3 - 1.0
                t2 = pairs[j] % 3 - 1.0
                s11 += h * t1 * t1
                s12 += h * t1 * t2
                s22 += h * t2 * t2
                b1 += h * t1 * weight[g, j]
                b2 += h * t2 * weight[g, j]
            lam = ridge
            while True:
                half = 0.5 * (s11 + s22) + lam
                spread = np.sqrt(0.25 * (s11 - s22) ** 2 + s12 * s12)
                if half + spread <= limit * (half - spread) or lam >= 1.0:
                    break
                lam = min(10.0 * lam, 1.0)
            determinant = (s11 + lam) * (s22 + lam) - s12 * s12
            old1 = first
            old2 = second
            first = ((s22 + lam) * b1 - s12 * b2) / determinant
            second = ((s11 + lam) * b2 - s12 * b1) / determinant
            fitted = 0.0
            placed = 0.0
            for j in range(width):
                h = importance[g, j]
                d = weight[g, j] - (pairs[j] // 3 - 1) * first - (pairs[j] % 3 - 1) * second
                fitted += h * d * d
                pairs[j] = nearest_pair(weight[g, j], first, second)
                d = weight[g, j] - (pairs[j] // 3 - 1) * first - (pairs[j] % 3 - 1) * second
                placed += h * d * d
            trace[g, 2 * step] = fitted
            trace[g, 2 * step + 1] = placed
            if placed < best:
                best = placed
                scales[g, 0] = first
                scales[g, 1] = second
            if max(abs(first - old1), abs(second - old2)) < 1e-4 * max(abs(first), abs(second)):
                for rest in range(2 * step + 2, 2 * rounds):
                    trace[g, rest] = placed
                break
