"""Compiled loops over groups of several widths: rounding with error feedback, and a search with a free exponent.

As in ``loops``: no fast-math, no threads, the interpreter lock released, additions in the written order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from layerwise.encoding.loops import nearest_code

Array = NDArray[Any]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def round_mixed(
    weight: Array,
    step: Array,
    zero: Array,
    top: Array,
    group_of: Array,
    lower: Array,
    first: int,
    carried: Array,
    codes: Array,
    change: Array,
) -> None:
    """Round the columns ``first .. first + width``, last first, each absorbing the errors of those on its right.

    Everything is transposed: weight [n, m] float32; step and zero [groups, m] float32; top [groups] float64, the
    largest code, 1 for a pair of values around ``zero`` (a half); group_of [n] int64; codes [n, m] uint8;
    change [n, m] float64 (D = W' - W); lower [width, width] and carried [width, m] float64 as in ``round_columns``.
    """
    for b in range(carried.shape[0] - 1, -1, -1):
        j = first + b
        g = group_of[j]
        for i in range(weight.shape[1]):
            s = step[g, i]
            z = zero[g, i]
            w = np.float64(weight[j, i])
            target = w - carried[b, i]
            if top[g] == 1.0:
                code = 1.0 if target > np.float64(s) * (0.5 - np.float64(z)) else 0.0
            else:
                code = nearest_code(target, np.float64(s), np.float64(z), top[g])
            codes[j, i] = np.uint8(code)
            change[j, i] = np.float64(s * (np.float32(code) - z)) - w
        for k in range(b):
            factor = lower[b, k]
            for i in range(weight.shape[1]):
                carried[k, i] += change[j, i] * factor


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def best_by_power(
    weight: Array, cost: Array, step: Array, zero: Array, width: int, top: float, power: float, best: Array
) -> None:
    """Which candidate grid rounds each group with the least ``sum cost * |w - w'|**power``, the first of equals.

    weight and cost [m, n] float32, step and zero [m, groups, candidates] float32 -> best [m, groups] int64.
    Errors are counted in units of the group's first step, so that their powers stay in range.
    """
    rows, columns = weight.shape
    half = 0.5 * power
    for i in range(rows):
        for g in range(step.shape[1]):
            least = np.inf
            unit = 1.0 / np.float64(step[i, g, 0])
            for k in range(step.shape[2]):
                s = np.float64(step[i, g, k])
                z = np.float64(zero[i, g, k])
                error = 0.0
                for j in range(g * width, min((g + 1) * width, columns)):
                    w = np.float64(weight[i, j])
                    code = nearest_code(w, s, z, top)
                    d = (w - (code - z) * s) * unit
                    error += np.float64(cost[i, j]) * (d * d) ** half
                    if error >= least:
                        break
                if error < least:
                    least = error
                    best[i, g] = k
