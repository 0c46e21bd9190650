"""Plans by an order: what matters most is raised to the next level first, until the bytes are spent.

    levels 2 < 4 < 8 < 16 bits a weight; the budget lies between "all at level j" and "all at level j + 1";
    groups in order of importance are raised from j to j + 1, and the first that does not fit ends it.

Every published rule that ranks layers or blocks is this with an order of its own. Plans of growing budgets are nested,
so more budget never lowers a site. A site at level ``b`` takes its smallest candidate of at least ``b`` stored bits a
weight, and its largest where none is that large. Rules know one way to write a block, so where rewrites offer
several the one whose smallest form is smallest is taken (the first among equals), and no block is ever taken out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from layerwise.errors import InputError
from layerwise.plan.measures import Place
from layerwise.plan.pareto import Pareto
from layerwise.plan.relaxation import relax
from layerwise.plan.tree import Allocation, Candidate, Choice, Leaf, Node, Sum, leaves, reached
from layerwise.recipe import surgery

Level = dict[str, Candidate]  # site -> its candidate at one level
Order = Callable[[Level, Level], Sequence[Sequence[str]]]  # (lower, higher) -> groups of sites, most important first


def read_levels(name: str, text: str) -> tuple[float, ...]:
    """``2/4/8`` -> bits a weight, ascending."""
    try:
        found = tuple(float(word) for word in text.split("/"))
    except ValueError:
        found = ()
    if len(found) < 2 or not all(0 < a < b <= 32 for a, b in pairwise(found)):
        raise InputError(f"levels of {name} must be rising bits a weight such as 2/4/8, not {text!r}")
    return found


def ordered_plan(
    tree: Node, budget: int, levels: Sequence[float], places: Mapping[str, Place], order: Order
) -> Allocation:
    """The plan of an order within ``budget``. Raises ``InputError`` below the bytes of the lowest level."""
    chosen = settled(tree)
    relax(chosen[0])  # refuses sites without candidates and impossible ones
    at = [level_of(chosen[0], bits, places) for bits in levels]
    sizes = [sum(c.bytes for c in level.values()) for level in at]
    refuse_below(sizes[0], budget)
    low = max(i for i, size in enumerate(sizes) if size <= budget)
    sites, size = dict(at[low]), sizes[low]
    if low + 1 < len(at):
        higher = at[low + 1]
        for group in order(at[low], higher):
            grown = sum(higher[site].bytes - sites[site].bytes for site in group)
            if size + grown > budget:
                break
            sites |= {site: higher[site] for site in group}
            size += grown
    return Allocation(sites, chosen[1])


def refuse_below(smallest: int, budget: int) -> None:
    if budget < smallest:
        raise InputError(f"no plan of this rule fits {budget} bytes; the smallest feasible budget is {smallest} bytes")


def level_of(tree: Node, bits: float, places: Mapping[str, Place]) -> Level:
    """Every site's candidate at one level."""
    return {leaf.name: candidate_at(leaf, bits, places[leaf.name].parameters) for leaf in leaves(tree)}


def candidate_at(leaf: Leaf, bits: float, parameters: int) -> Candidate:
    """The smallest candidate of at least ``bits`` a weight, else the largest; the least damage among equals."""
    rising = sorted(leaf.candidates, key=lambda c: (c.bytes, c.damage))
    return next((c for c in rising if 8 * c.bytes >= bits * parameters), _first_of_size(rising, rising[-1].bytes))


def _first_of_size(rising: Sequence[Candidate], size: int) -> Candidate:
    return next(c for c in rising if c.bytes == size)


def differing(low: Level, high: Level) -> list[str]:
    """Sites that change between two levels."""
    return [site for site in low if low[site] != high[site]]


# ---------------------------------------------------------------- trees


def settled(tree: Node) -> tuple[Node, dict[str, str]]:
    """The tree with one alternative at every choice, and which."""
    choices: dict[str, str] = {}
    return _settled(in_place(tree), choices), choices


def _settled(node: Node, choices: dict[str, str]) -> Node:
    if isinstance(node, Leaf):
        return node
    if isinstance(node, Sum):
        return Sum(node.name, tuple(_settled(child, choices) for child in node.children))
    if not node.options:
        raise InputError(f"{node.name!r} offers no alternative; at least one is needed")
    label, option = min(node.options, key=lambda entry: smallest_of(entry[1]))
    choices[node.name] = label
    return _settled(option, choices)


def smallest_of(node: Node) -> int:
    """Bytes of the smallest plan below a node."""
    if isinstance(node, Leaf):
        return min((c.bytes for c in node.candidates), default=0)
    if isinstance(node, Sum):
        return sum(smallest_of(child) for child in node.children)
    return min((smallest_of(option) for _, option in node.options), default=0)


def in_place(node: Node) -> Node:
    """The tree in which no block is taken out, wherever it may stay."""
    if isinstance(node, Leaf):
        return node
    if isinstance(node, Sum):
        return Sum(node.name, tuple(in_place(child) for child in node.children))
    stay = [(label, in_place(option)) for label, option in node.options if not _is_gone(option)]
    return Choice(node.name, tuple(stay) or node.options)


def _is_gone(node: Node) -> bool:
    found = [c for leaf in leaves(node) for c in leaf.candidates]
    return bool(found) and all(surgery(c.recipe) for c in found)


# ---------------------------------------------------------------- plans by a sum of scores

Scores = Mapping[str, Mapping[str, float]]  # site -> recipe -> a score that adds up over sites


def least_sum(tree: Node, budget: int, scores: Scores) -> Allocation:
    """The plan of the least sum of scores within the budget: the integer program, solved exactly."""
    relax(tree)  # refuses impossible candidates as they are given
    tree = in_place(tree)
    found = Pareto().allocate(_scored(tree, scores), budget)
    original = {leaf.name: {_key(c): c for c in leaf.candidates} for leaf in reached(tree, found.choices)}
    return Allocation({site: original[site][_key(c)] for site, c in found.sites.items()}, found.choices)


def sum_of(allocation: Allocation, scores: Scores) -> float:
    """What ``least_sum`` made small."""
    return sum(score_of(scores, site, c) for site, c in allocation.sites.items())


def score_of(scores: Scores, site: str, candidate: Candidate) -> float:
    """A candidate's score; zero at a site that no figure exists for, because the loss does not depend on it."""
    return scores[site][candidate.recipe] if site in scores else 0.0


def _key(candidate: Candidate) -> tuple[str, int]:
    return candidate.recipe, candidate.bytes


def _scored(node: Node, scores: Scores) -> Node:
    if isinstance(node, Leaf):
        scored = tuple(replace(c, damage=score_of(scores, node.name, c)) for c in node.candidates)
        return Leaf(node.name, scored)
    if isinstance(node, Sum):
        return Sum(node.name, tuple(_scored(child, scores) for child in node.children))
    return Choice(node.name, tuple((label, _scored(option, scores)) for label, option in node.options))
