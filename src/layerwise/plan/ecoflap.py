"""ECoFLaP: how steep the loss is in each block says how sparse the block may be; a local method says which weights go.

    coarse   c_l = E |L(W_l + eps z) - L(W_l - eps z)| / (2 eps)     one matrix at a time, z ~ N(0, I), no derivative
             s_g = sum of c_l over the matrices of block g
             keep_g = (1 - p - spread) N_g, then the rest of the budget by shares of s_g; a full block passes on
    fine     Wanda or SparseGPT at the sparsity of its block, in every matrix of it

``c_l`` estimates ``sqrt(2 / pi)`` times the length of the gradient (``layerwise/acts/slopes.py``). The share of the
rest goes by ``s_g``, not by ``s_g N_g``, as in the authors' code.

As a plan: a matrix's candidates lie between its smallest and its largest form, and ``keep`` is the place between the
two. The budget says where all matrices could lie alike (p); ``spread`` is how far below it a block may fall, as a share
of that range, the paper's 0.1. In each block every matrix takes its largest candidate within its place, so with masks
of rising sparsity all matrices of a block are equally sparse; what this leaves unused is shared out again. What lies
outside the blocks stays at the common place. In a network without blocks each layer is a group of its own.

Left open and chosen here: the loss's labels are drawn from the network's own distribution, since nothing is labelled;
4 draws of 8 sequences, each with a noise of its own, for the paper's 32 samples; surplus entries cannot occur, since
shares are found by bisection. A network whose scores are all zero is refused: then nothing says what may go. Towers
of a multi-modal network are not told apart.

Measured on docs-lm over Wanda's 16-bit candidates, in the bytes of uniform sparsity 0.5 / 0.6 / 0.7: KL 0.214 / 0.459 /
1.03, uniform 0.219 / 0.481 / 1.05, layerwise's own planner 0.161 / 0.347 / 0.744. A network of five blocks leaves the
rule little room; it costs 2 runs of the network for each matrix and draw.

Source: Y.-L. Sung, J. Yoon, M. Bansal, *ECoFLaP*, arXiv 2310.02998, and its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from layerwise.errors import InputError
from layerwise.plan.measures import Measures, Place, asked
from layerwise.plan.order import Level, refuse_below, settled, smallest_of
from layerwise.plan.relaxation import relax
from layerwise.plan.sparsities import over
from layerwise.plan.tree import Allocation, Candidate, Leaf, Node, leaves
from layerwise.roles import Allocator
from layerwise.technique import MEASURED_RISES, option, technique

OUTSIDE = ""
NONE = 1e-12  # a score below this share of the largest is none


@technique(paper="ECoFLaP", needs={MEASURED_RISES}, left_out="several towers, each with a budget of its own")
class Ecoflap(Allocator):
    """Sparsity of each block by the measured steepness of the loss, without derivatives."""

    spread: float = option(0.1, minimum=0, maximum=1, help="how far a block may fall below the common place")
    draws: int = option(4, minimum=1, help="noises a matrix, each on eight sequences of its own")
    size: float = option(1e-3, minimum=1e-6, maximum=0.1, help="eps: how far a weight is moved")
    over: ClassVar[tuple[str, ...]] = over("wanda")

    def allocate(self, tree: Node, budget: int, measures: Measures | None = None) -> Allocation:
        known = asked(measures, self.name)
        node, choices = settled(tree)
        relax(node)  # refuses sites without candidates and impossible ones
        refuse_below(smallest_of(node), budget)
        sites = list(leaves(node))
        groups = {leaf.name: group_of(leaf.name, known.places) for leaf in sites}
        ranges: dict[str, int] = {}
        for leaf in sites:
            ranges[groups[leaf.name]] = ranges.get(groups[leaf.name], 0) + _span(leaf)
        scores = self._scores(known, groups)

        def plan(spare: int) -> Level:
            places = shares(ranges, scores, spare, self.spread)
            return {leaf.name: candidate_within(leaf, places[groups[leaf.name]]) for leaf in sites}

        low, high = 0, sum(ranges.values()) + 1  # the most spare bytes whose plan fits: candidates lie below places
        while high - low > 1:
            middle = (low + high) // 2
            fits = sum(c.bytes for c in plan(middle).values()) <= budget
            low, high = (middle, high) if fits else (low, middle)
        return Allocation(plan(low), choices)

    def objective(self, tree: Node, allocation: Allocation, measures: Measures | None = None) -> float:
        """Shares have no sum to make small: as many bytes as fit are kept."""
        return -float(allocation.bytes)

    def _scores(self, measures: Measures, groups: Mapping[str, str]) -> dict[str, float]:
        """Group -> s_g."""
        slopes = measures.slopes(self.draws, self.size)
        found: dict[str, float] = {}
        for site, group in groups.items():
            if group != OUTSIDE:
                found[group] = found.get(group, 0.0) + slopes.get(site, 0.0)
        if found and not any(found.values()):
            raise InputError(f"{self.name} found no matrix whose move changes the loss; give a larger size")
        return found


def group_of(site: str, places: Mapping[str, Place]) -> str:
    """The block of a site; in a network without blocks the site itself."""
    block = places[site].block
    if block is not None:
        return block
    return OUTSIDE if any(place.block is not None for place in places.values()) else site


def shares(ranges: Mapping[str, int], scores: Mapping[str, float], spare: int, spread: float) -> dict[str, float]:
    """Group -> place in [0, 1] between its smallest and its largest form; together not above ``spare`` bytes.

    ranges: bytes between the two forms of each group. A group without a score lies at the common place.
    A larger ``spare`` moves no group down.
    """
    whole = sum(ranges.values())
    common = min(1.0, spare / whole) if whole else 1.0
    scored = {name: ranges[name] for name in scores if ranges.get(name)}
    at = dict.fromkeys(ranges, common)
    wanted = common * sum(scored.values())
    most = max((scores[name] for name in scored), default=0.0)
    if most <= 0 or common >= 1:
        return at
    floor = max(0.0, common - spread)
    rates = {name: (s if (s := scores[name] / most) > NONE else 0.0) / size for name, size in scored.items()}

    def filled(level: float) -> dict[str, float]:
        return {name: min(1.0, floor + rate * level) for name, rate in rates.items()}

    def used(found: Mapping[str, float]) -> float:
        return sum(place * scored[name] for name, place in found.items())

    low, high = 0.0, max(1 / rate for rate in rates.values() if rate > 0)
    for _ in range(64):  # places that differ in the 64th binary digit are equal
        middle = (low + high) / 2
        low, high = (middle, high) if used(filled(middle)) <= wanted else (low, middle)
    return at | filled(low)


def candidate_within(leaf: Leaf, place: float) -> Candidate:
    """The largest candidate that lies at or below ``place``; of equal bytes the least damage."""
    edge = _smallest(leaf) + place * _span(leaf) + 1e-6  # bytes are whole numbers
    return max((c for c in leaf.candidates if c.bytes <= edge), key=lambda c: (c.bytes, -c.damage))


def _smallest(leaf: Leaf) -> int:
    return min(c.bytes for c in leaf.candidates)


def _span(leaf: Leaf) -> int:
    return max(c.bytes for c in leaf.candidates) - _smallest(leaf)
