"""What changed from one plan to another."""

from __future__ import annotations

from dataclasses import dataclass

from layerwise.plan.file import PlanFile


@dataclass(frozen=True)
class Change:
    """A site whose choice differs; a recipe is ``None`` in the plan that lacks the site. Differences are B - A."""

    site: str
    before: str | None
    after: str | None
    bytes: int
    damage: float


@dataclass(frozen=True)
class BlockChange:
    """A block that took another alternative."""

    block: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Difference:
    """What differs site by site and block by block; ``bytes`` and ``damage`` are the differences of the whole plans."""

    same_network: bool
    sites: tuple[Change, ...]
    blocks: tuple[BlockChange, ...]
    bytes: int
    damage: float
    unchanged: int


def difference(a: PlanFile, b: PlanFile) -> Difference:
    """Rows for every site and block that differ, in A's order, sites that only B has last."""
    rows: list[Change] = []
    unchanged = 0
    for site in dict.fromkeys((*a.sites, *b.sites)):
        one, two = a.sites.get(site), b.sites.get(site)
        if one is not None and two is not None and one.recipe == two.recipe:
            unchanged += 1
            continue
        rows.append(
            Change(
                site,
                one.recipe if one else None,
                two.recipe if two else None,
                (two.bytes if two else 0) - (one.bytes if one else 0),
                (two.damage if two else 0.0) - (one.damage if one else 0.0),
            )
        )
    blocks = tuple(
        BlockChange(block, a.blocks.get(block), b.blocks.get(block))
        for block in dict.fromkeys((*a.blocks, *b.blocks))
        if a.blocks.get(block) != b.blocks.get(block)
    )
    return Difference(
        a.network.fingerprint == b.network.fingerprint,
        tuple(rows),
        blocks,
        b.predicted.bytes - a.predicted.bytes,
        b.predicted.damage - a.predicted.damage,
        unchanged,
    )
