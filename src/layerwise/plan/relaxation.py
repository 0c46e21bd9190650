"""The relaxed planning problem: candidates as arrays, and the lower convex hull of bytes against damage.

Were fractions of candidates allowed, the best damage at every budget would be the lower convex hull of the tree: a
leaf's hull is that of its candidates, a sum's hull joins its children's segments in order of slope, a choice's hull
is that of its alternatives together. The slope at a budget is the price ``p`` of a byte (damage per byte), and

    damage(x) - relaxed(budget) = p * (budget - bytes(x)) + excess(x)           both terms >= 0 in the budget

where the excess of a choice ``x`` is what it lies above the cheapest choice at price ``p``. Excesses add up over the
tree, which is what lets the exact solver discard partial plans (Dyer 1984, Zemel 1984, Pisinger 1995).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layerwise.errors import InputError
from layerwise.plan.tree import Leaf, Node, Sum

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

LARGEST_TOTAL = 1 << 61  # bytes; sums of two such totals still fit int64


@dataclass(frozen=True)
class Hull:
    """Vertices of a lower convex hull: bytes rise, damage falls, and falls ever more slowly."""

    bytes: Ints
    damage: Floats


@dataclass(frozen=True)
class LeafIndex:
    """A leaf, as the rows ``start:stop`` of the candidate arrays."""

    leaf: Leaf
    start: int
    stop: int


@dataclass(frozen=True)
class SumIndex:
    children: tuple[Index, ...]


@dataclass(frozen=True)
class ChoiceIndex:
    name: str
    labels: tuple[str, ...]
    options: tuple[Index, ...]


Index = LeafIndex | SumIndex | ChoiceIndex


@dataclass(frozen=True)
class Relaxation:
    """A tree made ready for planning at any budget.

    bytes, damage:  of every candidate that no other of its leaf dominates; sorted by bytes inside a leaf.
    position:       the candidate's place in its leaf.
    starts:         where each leaf begins.
    root:           the tree over these arrays.
    hull:           of the whole tree; its first vertex is the smallest feasible size.
    """

    bytes: Ints
    damage: Floats
    position: Ints
    starts: Ints
    root: Index
    hull: Hull

    @property
    def smallest(self) -> int:
        return int(self.hull.bytes[0])

    def price(self, budget: int) -> tuple[float, float]:
        """Price of a byte at a feasible budget, and the damage of a plan that is known to fit it."""
        at = int(np.searchsorted(self.hull.bytes, budget, side="right")) - 1
        best = float(self.hull.damage[at])
        if at == len(self.hull.bytes) - 1:
            return 0.0, best
        fall = best - float(self.hull.damage[at + 1])
        return fall / float(self.hull.bytes[at + 1] - self.hull.bytes[at]), best


def relax(tree: Node) -> Relaxation:
    """Flatten a tree; raises ``InputError`` where a site has no candidate or an impossible one."""
    parts: list[tuple[Ints, Floats, Ints]] = []
    root, hull = _visit(tree, parts, [0])
    size = np.concatenate([np.zeros(0, np.int64), *(p[0] for p in parts)])
    damage = np.concatenate([np.zeros(0), *(p[1] for p in parts)])
    position = np.concatenate([np.zeros(0, np.int64), *(p[2] for p in parts)])
    sizes = np.array([len(p[0]) for p in parts], dtype=np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)[:-1]]) if len(sizes) else np.zeros(0, np.int64)
    if len(sizes) and int(np.maximum.reduceat(size, starts).astype(object).sum()) >= LARGEST_TOTAL:
        raise InputError("the candidates' bytes add up to more than 2^61; no such network can be planned")
    return Relaxation(size, damage, position, starts, root, hull)


def _visit(node: Node, parts: list[tuple[Ints, Floats, Ints]], used: list[int]) -> tuple[Index, Hull]:
    if isinstance(node, Leaf):
        part = _undominated(node)
        start = used[0]
        used[0] += len(part[0])
        parts.append(part)
        return LeafIndex(node, start, used[0]), lower_hull(part[0], part[1])
    if isinstance(node, Sum):
        children: list[Index] = []
        hulls: list[Hull] = []
        for child in node.children:
            index, hull = _visit(child, parts, used)
            children.extend(index.children if isinstance(index, SumIndex) else (index,))
            hulls.append(hull)
        return SumIndex(tuple(children)), _added(hulls)
    if not node.options:
        raise InputError(f"{node.name!r} offers no alternative; at least one is needed")
    visited = [_visit(option, parts, used) for _, option in node.options]
    hull = lower_hull(np.concatenate([h.bytes for _, h in visited]), np.concatenate([h.damage for _, h in visited]))
    return ChoiceIndex(node.name, tuple(label for label, _ in node.options), tuple(i for i, _ in visited)), hull


def _undominated(leaf: Leaf) -> tuple[Ints, Floats, Ints]:
    """Bytes, damage and place of the candidates worth choosing: ever more bytes for ever less damage."""
    if not leaf.candidates:
        raise InputError(f"site {leaf.name!r} has no candidate; at least one recipe must apply to it")
    for c in leaf.candidates:
        if not (math.isfinite(c.damage) and c.damage >= 0) or not -LARGEST_TOTAL < c.bytes < LARGEST_TOTAL:
            raise InputError(
                f"candidate {c.recipe!r} of site {leaf.name!r} has {c.bytes} bytes and damage {c.damage}; a "
                f"damage must be finite and not negative, bytes below 2^61"
            )
    order = sorted(range(len(leaf.candidates)), key=lambda i: (leaf.candidates[i].bytes, leaf.candidates[i].damage, i))
    kept: list[int] = []
    for i in order:
        if not kept or leaf.candidates[i].damage < leaf.candidates[kept[-1]].damage:
            kept.append(i)
    return (
        np.array([leaf.candidates[i].bytes for i in kept], dtype=np.int64),
        np.array([leaf.candidates[i].damage for i in kept], dtype=np.float64),
        np.array(kept, dtype=np.int64),
    )


def lower_hull(size: Ints, damage: Floats) -> Hull:
    """Lower convex hull of points, from the fewest bytes to the least damage."""
    order = np.lexsort((damage, size))
    hull: list[tuple[int, float]] = []
    for point in zip(size[order].tolist(), damage[order].tolist(), strict=True):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1:
            (b0, d0), (b1, d1) = hull[-2], hull[-1]
            if (d0 - d1) * (point[0] - b1) > (d1 - point[1]) * (b1 - b0):
                break
            hull.pop()
        hull.append(point)
    return Hull(np.array([b for b, _ in hull], dtype=np.int64), np.array([d for _, d in hull], dtype=np.float64))


def _added(hulls: list[Hull]) -> Hull:
    """Hull of a sum: start at the sum of the first vertices, then take the segments from steepest to flattest."""
    grown = np.concatenate([np.diff(h.bytes) for h in hulls] or [np.zeros(0, np.int64)])
    fallen = np.concatenate([-np.diff(h.damage) for h in hulls] or [np.zeros(0)])
    order = np.argsort(-(fallen / np.maximum(grown, 1)), kind="stable")
    first_bytes = sum(int(h.bytes[0]) for h in hulls)
    # Damage is summed from the far end, where it is smallest, so that cancellation cannot push it below zero.
    last_damage = math.fsum(float(h.damage[-1]) for h in hulls)
    damage = last_damage + np.concatenate([np.cumsum(fallen[order][::-1])[::-1], np.zeros(1)])
    return Hull(np.concatenate([[first_bytes], first_bytes + np.cumsum(grown[order])]).astype(np.int64), damage)
