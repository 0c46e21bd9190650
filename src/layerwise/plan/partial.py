"""Partial plans: for a part of the tree, every plan that may still belong to the best one.

A front holds plans of one subtree as columns: bytes (rising), damage (falling, in integer units, so that sums are
exact and equal plans compare equal), and excess over the subtree's best at the current price. ``merged`` adds two
subtrees, ``either`` joins alternatives; both keep only plans that no other dominates and whose excess fits a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layerwise.plan.relaxation import ChoiceIndex, Floats, Ints, LeafIndex

Places = NDArray[np.int64]

LARGEST_TABLE = 1 << 23  # sums that are looked at together


@dataclass(frozen=True)
class Pick:
    """Where a leaf's plans come from: rows of the candidate arrays."""

    leaf: LeafIndex
    row: Places


@dataclass(frozen=True)
class Pair:
    """Where a merged front's plans come from: a plan of each side."""

    left: Origin
    right: Origin
    left_at: NDArray[np.int32]
    right_at: NDArray[np.int32]


@dataclass(frozen=True)
class Branch:
    """Where a choice's plans come from: an alternative, and a plan of it."""

    choice: ChoiceIndex
    options: tuple[tuple[int, Origin], ...]
    option: Places
    at: Places


@dataclass(frozen=True)
class Fixed:
    """One plan for several leaves at once: a row of the candidate arrays for each."""

    picks: tuple[tuple[LeafIndex, int], ...]


Origin = Pick | Pair | Branch | Fixed


@dataclass(frozen=True)
class Front:
    bytes: Ints
    damage: Ints
    excess: Floats
    origin: Origin
    thinned: int = 0  # units of damage by which thinning may have made a plan of this front worse

    def __len__(self) -> int:
        return len(self.bytes)


@dataclass(frozen=True)
class Limits:
    """What may be discarded.

    window:  plans whose excess is larger cannot be part of a plan inside the window.
    cap:     plans with more damage are worse than one that is known.
    states:  a longer front is thinned to about this length.
    """

    window: float
    cap: int
    states: int


def merged(left: Front, right: Front, limits: Limits) -> Front:
    """All sums of a plan of each side, less what the limits and dominance discard."""
    rows = max(1, LARGEST_TABLE // max(1, len(right)))
    size, damage, a, b = (np.zeros(0, np.int64) for _ in range(4))
    for start in range(0, len(left), rows):
        chunk = slice(start, start + rows)
        more_a, more_b = np.nonzero(left.excess[chunk, None] + right.excess[None, :] <= limits.window)
        a, b = np.concatenate([a, more_a + start]), np.concatenate([b, more_b])
        size = np.concatenate([size, left.bytes[more_a + start] + right.bytes[more_b]])
        damage = np.concatenate([damage, left.damage[more_a + start] + right.damage[more_b]])
        kept = undominated(size, damage, limits.cap)
        size, damage, a, b = size[kept], damage[kept], a[kept], b[kept]
    lost = left.thinned + right.thinned
    if len(size) > limits.states:
        step = int(damage[0] - damage[-1]) // limits.states + 1
        kept = thin(damage, step)
        size, damage, a, b = size[kept], damage[kept], a[kept], b[kept]
        lost += step
    origin = Pair(left.origin, right.origin, a.astype(np.int32), b.astype(np.int32))
    return Front(size, damage, left.excess[a] + right.excess[b], origin, lost)


def either(choice: ChoiceIndex, options: list[tuple[int, float, Front]], limits: Limits) -> Front:
    """Plans of all alternatives, each given as (place, what its best lies above the choice's best, front)."""
    size = np.concatenate([f.bytes for _, _, f in options])
    damage = np.concatenate([f.damage for _, _, f in options])
    excess = np.concatenate([f.excess + above for _, above, f in options])
    which = np.concatenate([np.full(len(f), i, dtype=np.int64) for i, (_, _, f) in enumerate(options)])
    at = np.concatenate([np.arange(len(f), dtype=np.int64) for _, _, f in options])
    inside = np.nonzero(excess <= limits.window)[0]
    kept = inside[undominated(size[inside], damage[inside], limits.cap)]
    origin = Branch(choice, tuple((place, f.origin) for place, _, f in options), which[kept], at[kept])
    return Front(size[kept], damage[kept], excess[kept], origin, max((f.thinned for _, _, f in options), default=0))


def undominated(size: Ints, damage: Ints, cap: int) -> Places:
    """Places of the plans that no other beats, by rising bytes; of equal ones the first."""
    order = np.argsort(size, kind="stable")
    falling = damage[order]
    lowest = np.minimum.accumulate(falling)
    better = np.empty(len(order), dtype=bool)
    if len(order):
        better[0] = falling[0] <= cap
        better[1:] = (falling[1:] < lowest[:-1]) & (falling[1:] <= cap)
    order = order[better]
    size = size[order]
    last = np.ones(len(order), dtype=bool)
    last[:-1] = size[1:] != size[:-1]  # among equal bytes, damage falls: the last is the best
    return order[last]


def thin(damage: Ints, step: int) -> Places:
    """Places to keep so that each plan dropped has a smaller kept one with less than ``step`` more damage."""
    bucket = damage // step
    keep = np.ones(len(damage), dtype=bool)
    keep[1:] = bucket[1:] != bucket[:-1]
    return np.nonzero(keep)[0]


def best_pair(left: Front, right: Front, budget: int) -> tuple[int, int, int, int] | None:
    """Least damage, then fewest bytes, of a plan of each side within the budget: (damage, bytes, left, right)."""
    if not len(left) or not len(right):
        return None
    at = np.searchsorted(right.bytes, budget - left.bytes, side="right") - 1
    fits = np.nonzero(at >= 0)[0]
    if not len(fits):
        return None
    damage = left.damage[fits] + right.damage[at[fits]]
    size = left.bytes[fits] + right.bytes[at[fits]]
    ties = np.nonzero(damage == damage.min())[0]
    best = ties[np.argmin(size[ties])]
    return int(damage[best]), int(size[best]), int(fits[best]), int(at[fits[best]])


def trace(front: Front, at: int) -> tuple[list[tuple[LeafIndex, int]], dict[str, str]]:
    """The plan at a place of a front: (leaf, row) pairs, and the label of every choice it passes."""
    picks: list[tuple[LeafIndex, int]] = []
    labels: dict[str, str] = {}
    stack: list[tuple[Origin, int]] = [(front.origin, at)]
    while stack:
        origin, at = stack.pop()
        if isinstance(origin, Fixed):
            picks.extend(origin.picks)
        elif isinstance(origin, Pick):
            picks.append((origin.leaf, int(origin.row[at])))
        elif isinstance(origin, Pair):
            stack.append((origin.right, int(origin.right_at[at])))
            stack.append((origin.left, int(origin.left_at[at])))
        else:
            place, inner = origin.options[int(origin.option[at])]
            labels[origin.choice.name] = origin.choice.labels[place]
            stack.append((inner, int(origin.at[at])))
    return picks, labels
