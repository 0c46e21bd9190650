"""DIMAP: weights are ranked among the layers that do the same work.

    Imp(w_(j)) = w_(j)^2 / sum_{i<=j} w_(i)^2       within a layer, magnitudes descending: the share of what is still
                                                    there that goes when w_(j) is the next to go
    modules: all query, key and value matrices | all attention outputs | all matrices of the MLPs
    in each module the lowest share s of Imp goes, the same s in every module

Without data. ``Imp`` does not change when a layer is scaled, so a rescaling of values and output projection that
cancels changes no mask; the largest weight of a layer has ``Imp = 1``, so no layer is emptied. The product of
``1 - Imp`` over what went is the share of the layer's squares that stays.

As a plan: each module gets the same bytes a weight, and in it the least sum of ``-log(kept / whole)`` is found, which
is the threshold on Imp (``plan/energy.py``). Sites outside the blocks (tables, heads) are the paper's AUX module, which
is not pruned: they too get the same bytes a weight and the candidate of least cost in it, alone, so with one candidate
they keep that. A module that is as large as it can be passes what it does not use to the others.

Left open in the paper and chosen here: whether modules share one ratio (they do), which module a network without
attention has (one, all its layers), how a layer's module is known: by its path, ``attn`` or ``attention`` in it and q,
k, v in its last part. ``modules=false`` ranks over everything, which is LAMP with AUX set apart: the ablation.

Source: Y. He, J. T. Zhou, *Data-independent Module-Aware Pruning for Hierarchical Vision Transformers*, arXiv
2404.13648. Its 30 epochs of fine-tuning are not here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

from layerwise.plan.energy import energy_costs
from layerwise.plan.measures import Measures, Place, asked
from layerwise.plan.order import least_sum, refuse_below, settled, smallest_of, sum_of
from layerwise.plan.relaxation import relax
from layerwise.plan.sparsities import over
from layerwise.plan.tree import Allocation, Leaf, Node, Sum, leaves
from layerwise.roles import Allocator
from layerwise.technique import option, technique

ATTENTION = re.compile(r"(^|[._])(self_?)?(attn|attention)([._]|$)", re.IGNORECASE)
QUERIES = re.compile(r"^(q|k|v|qkv|query|key|value|query_key_value|c_attn|wqkv|in_proj)(_proj|_lin)?$", re.IGNORECASE)
OUTSIDE = "aux"


@technique(paper="DIMAP", left_out="the fine-tuning with fixed masks")
class Dimap(Allocator):
    """One threshold for each kind of layer, on magnitudes relative to what the layer still holds."""

    modules: bool = option(True, help="rank within queries/keys/values, attention outputs and MLPs; false: over all")
    over: ClassVar[tuple[str, ...]] = over("magnitude:pattern=matrix")

    def allocate(self, tree: Node, budget: int, measures: Measures | None = None) -> Allocation:
        known = asked(measures, self.name)
        node, choices = settled(tree)
        relax(node)  # refuses sites without candidates and impossible ones
        refuse_below(smallest_of(node), budget)
        costs = energy_costs(known, "lamp")
        parts = self._parts(node, known.places)
        sizes = shared_out(
            {name: _range(part) for name, part in parts.items()},
            {name: sum(known.places[leaf.name].parameters for leaf in leaves(part)) for name, part in parts.items()},
            budget,
        )
        found = {}
        for name, part in parts.items():
            found.update(least_sum(part, sizes[name], costs).sites)
        return Allocation({leaf.name: found[leaf.name] for leaf in leaves(node)}, choices)

    def objective(self, tree: Node, allocation: Allocation, measures: Measures | None = None) -> float:
        """The sum over all modules."""
        return sum_of(allocation, energy_costs(asked(measures, self.name), "lamp"))

    def _parts(self, node: Node, places: Mapping[str, Place]) -> dict[str, Sum]:
        """Module -> its sites."""
        blocks = any(place.block is not None for place in places.values())
        found: dict[str, list[Leaf]] = {}
        for leaf in leaves(node):
            inside = places[leaf.name].block is not None or not blocks
            name = OUTSIDE if not inside else module_of(leaf.name) if self.modules else "all"
            found.setdefault(name, []).append(leaf)
        return {name: Sum(name, tuple(members)) for name, members in found.items()}


def module_of(site: str) -> str:
    """The module of a layer inside the blocks, by its path."""
    last = site.rpartition(".")[2]
    if QUERIES.match(last):
        return "qkv"
    return "projection" if ATTENTION.search(site) else "mlp"


def _range(node: Node) -> tuple[int, int]:
    sizes = [[c.bytes for c in leaf.candidates] for leaf in leaves(node)]
    return sum(map(min, sizes)), sum(map(max, sizes))


def shared_out(ranges: Mapping[str, tuple[int, int]], weights: Mapping[str, int], budget: int) -> dict[str, int]:
    """Bytes of each part: the same a weight, within what each can use; together not above the budget.

    ranges: the smallest and the largest bytes of a part. A larger budget gives no part less.
    """

    def at(rate: float) -> dict[str, int]:
        return {name: min(high, max(low, int(rate * weights[name]))) for name, (low, high) in ranges.items()}

    low = 0.0
    high = 1.0 + max((high / max(1, weights[name]) for name, (_, high) in ranges.items()), default=0.0)
    if sum(at(high).values()) <= budget:
        return at(high)
    for _ in range(64):  # rates that differ in the 64th binary digit give equal bytes
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle).values()) <= budget else (low, middle)
    return at(low)
