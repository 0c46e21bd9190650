"""What a site would cost one step up or down: the next better and the next cheaper of its candidates."""

from __future__ import annotations

from dataclasses import dataclass

from layerwise.plan.tree import Allocation, Candidate, Leaf, Node, reached


@dataclass(frozen=True)
class Step:
    """A change of one site's recipe: bytes and damage are differences from what was chosen."""

    recipe: str
    bytes: int
    damage: float


@dataclass(frozen=True)
class Neighbours:
    better: Step | None
    cheaper: Step | None


def neighbours(leaf: Leaf, chosen: Candidate) -> Neighbours:
    """The least addition of bytes that lowers a site's damage, and the least damage at fewer bytes."""
    better = [c for c in leaf.candidates if c.damage < chosen.damage]
    cheaper = [c for c in leaf.candidates if c.bytes < chosen.bytes]
    up = min(better, key=lambda c: (c.bytes, c.damage), default=None)
    down = min(cheaper, key=lambda c: (c.damage, c.bytes), default=None)
    return Neighbours(_step(up, chosen), _step(down, chosen))


def all_neighbours(tree: Node, allocation: Allocation) -> dict[str, Neighbours]:
    """Neighbours of every site of an allocation."""
    return {
        leaf.name: neighbours(leaf, allocation.sites[leaf.name])
        for leaf in reached(tree, allocation.choices)
        if leaf.name in allocation.sites
    }


def _step(to: Candidate | None, chosen: Candidate) -> Step | None:
    return None if to is None else Step(to.recipe, to.bytes - chosen.bytes, to.damage - chosen.damage)
