"""Made-up figures of a network for the tests of allocators: deterministic functions of names, sizes and damages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

from layerwise.plan.measures import Measures, Place
from layerwise.plan.tree import Candidate, Node, leaves
from layerwise.sensitivity.hessian import Hessian


@dataclass(frozen=True)
class MadeUp(Measures):
    """Figures of every site of a tree; each site lies in one of three blocks."""

    tree: Node

    @property
    def places(self) -> Mapping[str, Place]:
        return {
            leaf.name: Place(max([1, *(c.bytes for c in leaf.candidates)]) // 2 + 1, f"block {number(leaf.name) % 3}")
            for leaf in leaves(self.tree)
        }

    def hessians(self) -> Mapping[str, Hessian]:
        return {name: Hessian(*(1.0 + number(name + kind) % 97 for kind in "abc")) for name in self.places}

    def scores(self, scorer: str) -> Mapping[str, Mapping[str, float]]:
        return {
            leaf.name: {c.recipe: self.cost(leaf.name, c) for c in self._candidates(leaf.name)}
            for leaf in leaves(self.tree)
        }

    def influence(self) -> Mapping[str, float]:
        return {f"block {i}": (0.3, 0.1, 0.2)[i] for i in range(3)}

    def outliers(self) -> Mapping[str, float]:
        return {f"block {i}": (0.16, 0.2, 0.1)[i] for i in range(3)}

    def rises(self, changes: Sequence[Mapping[str, str]]) -> list[float]:
        """Costs add up, and sites of one block cost a little extra together."""
        out = []
        for change in changes:
            costs = {s: self.cost(s, self._find(s, recipe)) for s, recipe in change.items()}
            blocks: dict[str | None, float] = {}
            for site, cost in costs.items():
                blocks[self.places[site].block] = blocks.get(self.places[site].block, 0.0) + cost
            out.append(sum(costs.values()) + 0.1 * sum(total**2 for total in blocks.values()))
        return out

    def cost(self, site: str, candidate: Candidate) -> float:
        return (1 + number(site) % 7) / (1 + abs(candidate.bytes))

    def _candidates(self, site: str) -> list[Candidate]:
        return [c for leaf in leaves(self.tree) if leaf.name == site for c in leaf.candidates]

    def _find(self, site: str, recipe: str) -> Candidate:
        return next(c for c in self._candidates(site) if c.recipe == recipe)


def number(name: str) -> int:
    return crc32(name.encode())
