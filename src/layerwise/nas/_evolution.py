"""Evolution on a trained supernet: what does well is changed a little; nothing is looked at twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from layerwise.nas._space import Architecture, Space

Item = TypeVar("Item")
ATTEMPTS = 200  # draws of something new before a generation ends short


def pick(items: Sequence[Item], generator: torch.Generator) -> Item:
    return items[int(torch.randint(0, len(items), (1,), generator=generator))]


def looks(population: int, generations: int) -> int:
    """How many items ``evolve`` looks at, at most."""
    return population + generations * max(1, population // 2)


def evolve(
    first: Callable[[], Item],
    changed: Callable[[Item], Item],
    loss: Callable[[Item], float],
    population: int,
    generations: int,
    generator: torch.Generator,
) -> list[tuple[Item, float]]:
    """Everything that was looked at, least loss first: ``population`` draws, then half as many children a generation.

    Children are changes of the best quarter.
    """
    seen: dict[Item, float] = {}

    def look(draws: Callable[[], Item], count: int) -> None:
        for _ in range(ATTEMPTS):
            if count == 0:
                return
            item = draws()
            if item not in seen:
                seen[item] = loss(item)
                count -= 1

    look(first, population)
    for _ in range(generations):
        best = sorted(seen, key=lambda item: seen[item])[: max(1, population // 4)]
        look(lambda best=best: changed(pick(best, generator)), max(1, population // 2))  # type: ignore[misc]
    return sorted(seen.items(), key=lambda pair: pair[1])


def neighbour(
    space: Space, architecture: Architecture, offered: Sequence[Sequence[int]], generator: torch.Generator
) -> Architecture:
    """One choice drawn anew: the width, the depth or a block's ratio; ``offered``: the ratios of each block."""
    kind = int(torch.randint(0, 2 + architecture.depth, (1,), generator=generator))
    if kind == 0:
        return replace(architecture, width=pick(space.widths, generator))
    ratios = list(architecture.ratios)
    if kind == 1:
        depth = pick(space.depths, generator)
        ratios += [pick(offered[i], generator) for i in range(len(ratios), depth)]
        return replace(architecture, ratios=tuple(ratios[:depth]))
    ratios[kind - 2] = pick(offered[kind - 2], generator)
    return replace(architecture, ratios=tuple(ratios))
