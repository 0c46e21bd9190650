"""Made-up figures of a network for the tests of allocators: deterministic functions of names, sizes and damages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from zlib import crc32

from layerwise.plan.measures import Measures, Place
from layerwise.plan.tree import Candidate, Node, leaves
from layerwise.sensitivity.hessian import Hessian
from layerwise.sensitivity.spectrum import Spectrum


@dataclass(frozen=True)
class MadeUp(Measures):
    """Figures of every site of a tree; each site lies in one of three blocks."""

    tree: Node

    @cached_property
    def places(self) -> Mapping[str, Place]:
        return {
            leaf.name: Place(max([1, *(c.bytes for c in leaf.candidates)]) // 2 + 1, f"block {number(leaf.name) % 3}")
            for leaf in leaves(self.tree)
        }

    def hessians(self) -> Mapping[str, Hessian]:
        return {name: Hessian(*(1.0 + number(name + kind) % 97 for kind in "abc")) for name in self.places}

    def scores(self, scorer: str) -> Mapping[str, Mapping[str, float]]:
        return {
            site: {recipe: self.cost(site, c) for recipe, c in found.items()}
            for site, found in self._candidates.items()
        }

    def energies(self) -> Mapping[str, Mapping[str, tuple[float, float]]]:
        return {
            site: {recipe: (self.cost(site, c), 8.0) for recipe, c in found.items()}
            for site, found in self._candidates.items()
        }

    def slopes(self, draws: int, size: float) -> Mapping[str, float]:
        return {name: 1.0 + number(name) % 13 for name in self.places}

    def influence(self) -> Mapping[str, float]:
        return {f"block {i}": (0.3, 0.1, 0.2)[i] for i in range(3)}

    def outliers(self) -> Mapping[str, float]:
        return {f"block {i}": (0.16, 0.2, 0.1)[i] for i in range(3)}

    def spectra(self) -> Mapping[str, Spectrum]:
        """Sixteen singular values that fall at a pace of the site's own, of matrices of two shapes."""
        found = {}
        for name in self.places:
            pace, wide = 0.5 + number(name) % 40 / 100, 16 * (1 + number(name) % 2)
            found[name] = Spectrum(tuple(sorted(pace**i for i in range(16))), 16, wide)
        return found

    def rises(self, changes: Sequence[Mapping[str, str]]) -> list[float]:
        """Costs add up, and sites of one block cost a little extra together."""
        out = []
        for change in changes:
            costs = {s: self.cost(s, self._candidates[s][recipe]) for s, recipe in change.items()}
            blocks: dict[str | None, float] = {}
            for site, cost in costs.items():
                blocks[self.places[site].block] = blocks.get(self.places[site].block, 0.0) + cost
            out.append(sum(costs.values()) + 0.1 * sum(total**2 for total in blocks.values()))
        return out

    def cost(self, site: str, candidate: Candidate) -> float:
        return (1 + number(site) % 7) / (1 + abs(candidate.bytes))

    @cached_property
    def _candidates(self) -> dict[str, dict[str, Candidate]]:
        found: dict[str, dict[str, Candidate]] = {}
        for leaf in leaves(self.tree):
            found.setdefault(leaf.name, {}).update({c.recipe: c for c in leaf.candidates})
        return found


def number(name: str) -> int:
    return crc32(name.encode())
