"""Compiled loops that cut weights to the paths of a trellis.

As in ``loops``: no fast-math and no threads, so a machine type always gives the same codes, and the interpreter lock is
released. A strip is 32 rows of one column, a ring: its best path is looked for twice. First over the last sixteen rows
and the first sixteen, with any beginning and any end, which says in which state the last row is left; then from that
state in front of the first row to the same state behind the last. (For the best of all paths that close, each state
would have to be tried.)

Transposed, as in ``loops``: weight [n, m] float32, scales [groups, m] float32, codes and states [n, m] uint8.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from layerwise.encoding.trellis import STRIP
from layerwise.encoding.trellis_tables import STATES

Array = NDArray[Any]
AROUND = 16  # rows looked at on both sides of where the ring is closed
NEVER = np.float32(1e30)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _walk(
    wanted: Array, cost: Array, count: int, turn: int, steps: int, closed: int, bits: int, table: Array, room: Array,
    came: Array, path: Array,
) -> None:  # fmt: skip
    """The path of least ``sum cost (wanted - table[state])^2`` over some rows, ``steps`` from row ``turn`` on.

    wanted, cost [32] float32; rows from ``count`` on have code 0; ``closed``: the state before and behind, -1 for any.
    room [3, 256] float32 and came [32, 128] uint8 are written over. -> path [32] uint8, by place, not by row.
    """
    fan = 1 << bits
    kept = STATES >> bits
    now, least, own = room[0], room[1], room[2]
    for s in range(STATES):
        now[s] = np.float32(0) if closed < 0 or s == closed else NEVER
    for place in range(steps):
        row = (place + turn) % STRIP
        v, c = wanted[row], cost[row]
        back = came[place]
        for h in range(kept):
            least[h] = now[h]
            back[h] = 0
        for j in range(1, fan):
            at = now[j * kept : (j + 1) * kept]
            for h in range(kept):
                better = at[h] < least[h]
                least[h] = at[h] if better else least[h]
                back[h] = np.uint8(j) if better else back[h]
        for s in range(STATES):
            d = v - table[s]
            own[s] = d * d * c
        if row < count:
            for h in range(kept):
                first = least[h]
                for q in range(h * fan, (h + 1) * fan):
                    now[q] = first + own[q]
        else:
            for h in range(kept):
                for q in range(h * fan, (h + 1) * fan):
                    now[q] = NEVER
                now[h * fan] = least[h]
    state = closed
    if closed < 0:
        state = 0
        for s in range(1, STATES):
            if now[s] < now[state]:
                state = s
    for place in range(steps - 1, -1, -1):
        path[place] = np.uint8(state)
        h = state >> bits
        state = h + int(came[place, h]) * kept


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def cut_strip(
    wanted: Array, cost: Array, count: int, bits: int, table: Array, room: Array, came: Array, path: Array
) -> None:
    """States of one ring, ``path`` [32] uint8; see ``_walk``."""
    _walk(wanted, cost, count, STRIP - AROUND, 2 * AROUND, -1, bits, table, room, came, path)
    _walk(wanted, cost, count, 0, STRIP, int(path[AROUND - 1]), bits, table, room, came, path)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def cut_tile(
    weight: Array,
    scales: Array,
    group_of: Array,
    table: Array,
    bits: int,
    lower: Array,
    first: int,
    first_row: int,
    height: int,
    carried: Array,
    states: Array,
    change: Array,
    coupled: bool,
    pivots: Array,
    lower_rows: Array,
    below: Array,
    absorbed: Array,
) -> None:
    """One tile of the first pass, as ``level_loops.place_tile``, strip by strip instead of row by row.

    pivots [height] float64: what an own error of each row costs; lower_rows [height, height]: of strips upon strips,
    the identity inside a strip. lower, carried, change, below, absorbed as there.
    """
    room = np.empty((3, STATES), np.float32)
    came = np.empty((STRIP, STATES // 2), np.uint8)
    path = np.empty(STRIP, np.uint8)
    wanted, cost = np.zeros(STRIP, np.float32), np.zeros(STRIP, np.float32)
    width = carried.shape[0]
    for b in range(width - 1, -1, -1):
        j = first + b
        own = scales[group_of[j]]
        for start in range((height - 1) // STRIP * STRIP, -1, -STRIP):
            count = min(STRIP, height - start)
            for r in range(count):
                i = first_row + start + r
                value = np.float64(weight[j, i]) - carried[b, i]
                if coupled:
                    value -= below[b, start + r]
                s = np.float64(own[i])
                wanted[r] = np.float32(value / s) if s > 0 else np.float32(0)
                cost[r] = np.float32(pivots[start + r] * s * s)
            cut_strip(wanted, cost, count, bits, table, room, came, path)
            for r in range(count):
                i = first_row + start + r
                d = np.float64(table[path[r]]) * np.float64(own[i]) - np.float64(weight[j, i])
                states[j, i] = path[r]
                change[j, i] = d
                if coupled:
                    c = d + carried[b, i]
                    absorbed[b, i] = c
                    for k in range(start):
                        below[b, k] += lower_rows[start + r, k] * c
        for k in range(b):
            factor = lower[b, k]
            for i in range(first_row, first_row + height):
                carried[k, i] += change[j, i] * factor


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def recut_tile(
    weight: Array,
    scales: Array,
    group_of: Array,
    table: Array,
    bits: int,
    curvature: Array,
    first: int,
    first_row: int,
    height: int,
    pull: Array,
    states: Array,
    change: Array,
    row_curvature: Array,
    slope: Array,
) -> None:
    """One tile of a sweep: each strip of each column takes a better path while all others stay, if one is found.

    What an entry of the strip costs is ``R_ii C_jj (w' - t_i)^2`` around the best place of each alone; the path so
    found is weighed with all of R between the strip's rows, and taken where the loss falls. curvature [width, width],
    pull [width, m], row_curvature [height, height] and slope [width, height] float64 as in ``loops.revise_tile``.
    """
    room = np.empty((3, STATES), np.float32)
    came = np.empty((STRIP, STATES // 2), np.uint8)
    path = np.empty(STRIP, np.uint8)
    wanted, cost = np.zeros(STRIP, np.float32), np.zeros(STRIP, np.float32)
    moved = np.zeros(STRIP)
    width = pull.shape[0]
    for b in range(width - 1, -1, -1):
        j = first + b
        own = scales[group_of[j]]
        bend = curvature[b, b]
        for start in range((height - 1) // STRIP * STRIP, -1, -STRIP):
            count = min(STRIP, height - start)
            for r in range(count):
                a = start + r
                i = first_row + a
                s = np.float64(own[i])
                at = np.float64(weight[j, i]) + change[j, i] - slope[b, a] / (row_curvature[a, a] * bend)
                wanted[r] = np.float32(at / s) if s > 0 else np.float32(0)
                cost[r] = np.float32(row_curvature[a, a] * s * s)
            cut_strip(wanted, cost, count, bits, table, room, came, path)
            gain = 0.0
            for r in range(count):
                a = start + r
                i = first_row + a
                moved[r] = np.float64(table[path[r]]) * np.float64(own[i]) - np.float64(weight[j, i]) - change[j, i]
                gain += 2.0 * moved[r] * slope[b, a]
            for r in range(count):
                if moved[r] != 0.0:
                    for q in range(count):
                        gain += bend * moved[r] * moved[q] * row_curvature[start + r, start + q]
            if gain >= 0.0:
                continue
            for r in range(count):
                i = first_row + start + r
                states[j, i] = path[r]
                change[j, i] += moved[r]
                if moved[r] != 0.0:
                    for k in range(width):
                        pull[k, i] += curvature[b, k] * moved[r]
            for a in range(height):
                push = 0.0
                for r in range(count):
                    push += row_curvature[a, start + r] * moved[r]
                for k in range(b + 1):  # columns behind this one are done with
                    slope[k, a] += curvature[b, k] * push
