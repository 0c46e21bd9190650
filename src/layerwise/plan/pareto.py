"""layerwise's planner: the least damage within a budget, exactly, over a tree of alternatives.

A multiple-choice knapsack with choices of whole subtrees. With the price ``p`` of a byte from the relaxed problem, a
plan that is better than one already known has an excess of at most ``known - relaxed`` (see ``relaxation``). So plans
of growing parts of the tree are merged and every partial plan whose excess leaves that window is dropped, as is every
partial plan that another one beats in bytes and damage. The window starts small and is widened until the best plan
found lies inside it: then nothing outside can be better. The two halves of the tree meet by binary search.

Damages are compared as integers of ``2^-61`` of the best known damage, so ties are ties. The result is the optimum;
being the optimum, it never gets worse when the budget grows. Only a front that grows beyond ``states`` plans is
thinned (damage in almost exact proportion to bytes; never seen on a network); the harm is then proved to be below
``GAP``, and what a smaller budget of the same call achieved is kept where it is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layerwise.errors import InputError
from layerwise.plan.measures import Measures
from layerwise.plan.partial import Fixed, Front, Limits, Pick, best_pair, either, merged, trace
from layerwise.plan.relaxation import ChoiceIndex, Floats, Index, Ints, LeafIndex, Relaxation, SumIndex, relax
from layerwise.plan.tree import Allocation, Node, leaves
from layerwise.roles import Allocator
from layerwise.technique import option, technique

GAP = 1e-4  # largest relative distance from the optimum that is ever accepted
UNIT_BITS = 60  # the best known damage is about 2^60 units
FIRST_WINDOW = 1 / 64  # of the widest; grows fourfold
FIRST_STATES = 2000  # where plans abound, a search on fronts this short comes first and tightens the window
ROUNDING = 1e-12  # relative allowance for float sums when plans are discarded


@technique(paper="layerwise")
class Pareto(Allocator):
    """Exact plan over bytes and damage: relaxation for the bounds, merged Pareto fronts for the optimum."""

    states: int = option(200_000, minimum=100, help="plans that a front may hold before it is thinned")

    def allocate(self, tree: Node, budget: int, measures: Measures | None = None) -> Allocation:
        return self.front(tree, [budget])[0]

    def front(self, tree: Node, budgets: Sequence[int]) -> list[Allocation]:
        """The best plan at each budget, in the order given; the tree is prepared once."""
        return [solution.allocation for solution in self.solve(tree, budgets)]

    def solve(self, tree: Node, budgets: Sequence[int]) -> list[Solution]:
        """As ``front``, with the proof: no plan within the budget has less damage than ``least``."""
        relaxed = relax(tree)
        for budget in budgets:
            if budget < relaxed.smallest:
                raise InputError(
                    f"no plan fits {budget} bytes; the smallest feasible budget is {relaxed.smallest} bytes"
                )
        order = {leaf.name: i for i, leaf in enumerate(leaves(tree))}
        found: dict[int, Solution] = {}
        best: Solution | None = None
        for budget in sorted(set(budgets)):
            solution = _solve(relaxed, order, int(budget), self.states)
            if best is not None and best.allocation.damage < solution.allocation.damage:
                solution = Solution(best.allocation, min(solution.least, best.allocation.damage))
            found[budget] = best = solution
        return [found[budget] for budget in budgets]


@dataclass(frozen=True)
class Solution:
    """A plan, and the damage that no plan within the same budget can fall below."""

    allocation: Allocation
    least: float

    @property
    def gap(self) -> float:
        """Proved relative distance from the optimum."""
        worse = self.allocation.damage - self.least
        if worse <= 0:
            return 0.0
        return worse / self.least if self.least > 0 else math.inf


def front(tree: Node, budgets: Sequence[int]) -> list[Allocation]:
    """The best plan at each budget."""
    return Pareto().front(tree, budgets)


def _solve(relaxed: Relaxation, order: dict[str, int], budget: int, states: int) -> Solution:
    price, known = relaxed.price(budget)
    search = _Search(relaxed, price, known, budget)
    length = min(FIRST_STATES, states)
    while True:
        found = search.run(length)
        least = max(search.lower, float(found.damage - found.lost))
        if found.lost == 0 or found.damage - search.lower <= search.rounding:
            break
        if length >= states and found.damage - least <= GAP * least:
            break
        length = min(length * 10, states) if length < states else length * 4
    picks, labels = trace(found.left, found.left_at)
    more, more_labels = trace(found.right, found.right_at)
    chosen = sorted([*picks, *more], key=lambda pick: order[pick[0].leaf.name])
    sites = {index.leaf.name: index.leaf.candidates[int(relaxed.position[row])] for index, row in chosen}
    if len(sites) != len(chosen):
        raise InputError("a site is named twice in the same tree; each must be a leaf of its own")
    allocation = Allocation(sites, {**labels, **more_labels})
    if found.lost == 0:
        return Solution(allocation, allocation.damage)
    return Solution(allocation, min(math.ldexp(least, -search.exponent), allocation.damage))


@dataclass(frozen=True)
class _Found:
    """The best pair of partial plans, its damage, and the units of damage that thinning may have cost."""

    left: Front
    right: Front
    left_at: int
    right_at: int
    damage: int
    lost: int


class _Search:
    """The search at one budget and its price; damage in integer units of ``2^-exponent``."""

    def __init__(self, relaxed: Relaxation, price: float, known: float, budget: int) -> None:
        self.relaxed, self.budget = relaxed, budget
        # With nothing to lose, the unit only has to tell the smallest damage there is from none.
        largest = known if known > 0 else min(relaxed.damage[relaxed.damage > 0].tolist(), default=1.0)
        self.exponent = UNIT_BITS - math.frexp(largest)[1]
        self.cap = math.ceil(math.ldexp(known, self.exponent) * (1 + ROUNDING)) + len(relaxed.starts) + 1
        self.price = math.ldexp(price, self.exponent)
        with np.errstate(over="ignore"):
            scaled = np.minimum(np.ldexp(relaxed.damage, self.exponent), float(1 << 62))
        self.usable = scaled <= self.cap
        self.damage: Ints = np.rint(np.where(self.usable, scaled, 0)).astype(np.int64)
        cost = scaled + self.price * relaxed.bytes
        self.least: Floats = np.minimum.reduceat(cost, relaxed.starts) if len(cost) else cost
        self.excess: Floats = cost - np.repeat(self.least, np.diff(np.append(relaxed.starts, len(cost))))
        self.place = {int(start): i for i, start in enumerate(relaxed.starts)}
        self.values: dict[int, float] = {}
        total = self.value(relaxed.root)
        self.rounding = ROUNDING * (abs(total) + self.cap)
        self.lower = total - self.price * budget

    def run(self, states: int) -> _Found:
        """The best plan; exact unless a front grew beyond ``states`` and was thinned."""
        widest = max(self.cap - self.lower, 0.0) + self.rounding
        window = widest * FIRST_WINDOW
        while True:
            left, right = self.halves(Limits(window, self.cap, states))
            pair = best_pair(left, right, self.budget)
            if pair is not None:
                self.cap = min(self.cap, pair[0])
                widest = max(self.cap - self.lower, 0.0) + self.rounding
                if widest <= window:
                    return _Found(left, right, pair[2], pair[3], pair[0], left.thinned + right.thinned)
            elif window >= widest:
                raise RuntimeError("the plan that is known to fit was lost; this is a defect of the planner")
            window = min(window * 4, widest)

    def value(self, node: Index) -> float:
        """Least cost ``damage + price * bytes`` of a subtree."""
        known = self.values.get(id(node))
        if known is None:
            if isinstance(node, LeafIndex):
                known = float(self.least[self.place[node.start]])
            elif isinstance(node, SumIndex):
                known = math.fsum(self.value(child) for child in node.children)
            else:
                known = min(self.value(child) for child in node.options)
            self.values[id(node)] = known
        return known

    def halves(self, limits: Limits) -> tuple[Front, Front]:
        """Two fronts, of disjoint parts of the tree, that together make up the whole."""
        children = self.relaxed.root.children if isinstance(self.relaxed.root, SumIndex) else (self.relaxed.root,)
        fixed, free = self._parts(children, limits)
        sides = [fixed, _nothing()]
        for part in free:
            side = 0 if len(sides[0]) <= len(sides[1]) else 1
            sides[side] = merged(sides[side], part, limits)
        return sides[0], sides[1]

    def _parts(self, children: Sequence[Index], limits: Limits) -> tuple[Front, list[Front]]:
        """One front for all children that have a single plan left, and the others' fronts."""
        picks: list[tuple[LeafIndex, int]] = []
        size, damage, excess = 0, 0, 0.0
        free: list[Front] = []
        for child in children:
            rows = self._rows(child, limits) if isinstance(child, LeafIndex) else None
            if rows is not None and len(rows) == 1:
                row = int(rows[0])
                picks.append((child, row))  # type: ignore[arg-type]
                size, damage = size + int(self.relaxed.bytes[row]), damage + int(self.damage[row])
                excess += float(self.excess[row])
            else:
                free.append(self._front(child, limits))
        if damage > limits.cap:
            return _none(), []
        fixed = Front(np.array([size]), np.array([damage]), np.array([excess]), Fixed(tuple(picks)))
        return fixed, free

    def _rows(self, leaf: LeafIndex, limits: Limits) -> Ints:
        inside = (self.excess[leaf.start : leaf.stop] <= limits.window) & self.usable[leaf.start : leaf.stop]
        return leaf.start + np.nonzero(inside)[0]

    def _front(self, node: Index, limits: Limits) -> Front:
        if isinstance(node, LeafIndex):
            rows = self._rows(node, limits)
            return Front(self.relaxed.bytes[rows], self.damage[rows], self.excess[rows], Pick(node, rows))
        if isinstance(node, SumIndex):
            total, free = self._parts(node.children, limits)
            for part in free:
                total = merged(total, part, limits)
            return total
        return self._choice(node, limits)

    def _choice(self, node: ChoiceIndex, limits: Limits) -> Front:
        least = self.value(node)
        options = []
        for place, child in enumerate(node.options):
            above = self.value(child) - least
            if above <= limits.window:
                options.append((place, above, self._front(child, limits)))
        return either(node, options, limits) if options else _none()


def _nothing() -> Front:
    """The one plan of no sites."""
    return Front(np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1), Fixed(()))


def _none() -> Front:
    """No plan at all."""
    return Front(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), Fixed(()))
