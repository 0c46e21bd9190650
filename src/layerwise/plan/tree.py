"""The site tree as the solver sees it: alternatives with bytes and damage, and what was chosen.

Sum("network")
├── Leaf("embeddings.word_embeddings")          candidates of one site: pick one
├── Choice("encoder.layer.0")                   alternatives of one block: pick one
│   ├── "as is" : Sum of Leaf, Leaf, …
│   └── "awq"   : Sum of Leaf, Leaf, …          (the same sites, rewritten)
└── …
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """One recipe at one site.

    bytes:   what choosing it adds to the file, its share of the header included; below zero where a block that is
             taken out takes its norms along.
    damage:  predicted rise of the loss, in the loss's own unit; finite and not negative.
    seconds: predicted time of one forward pass over it, zero when unknown.
    """

    recipe: str
    bytes: int
    damage: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Leaf:
    """A site: exactly one of its candidates is chosen."""

    name: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Sum:
    """A node that is the sum of its children."""

    name: str
    children: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    """A node with alternatives: exactly one (label, subtree) is chosen."""

    name: str
    options: tuple[tuple[str, Node], ...]


Node = Leaf | Sum | Choice


@dataclass(frozen=True)
class Allocation:
    """What was chosen: a candidate for every reached leaf, a label for every reached choice."""

    sites: dict[str, Candidate]
    choices: dict[str, str]

    @property
    def bytes(self) -> int:
        return sum(c.bytes for c in self.sites.values())

    @property
    def damage(self) -> float:
        return math.fsum(c.damage for c in self.sites.values())  # the order of sites must not matter


def leaves(node: Node) -> Iterator[Leaf]:
    """All leaves below a node, those of every alternative included."""
    if isinstance(node, Leaf):
        yield node
    elif isinstance(node, Sum):
        for child in node.children:
            yield from leaves(child)
    else:
        for _, option in node.options:
            yield from leaves(option)


def reached(node: Node, choices: Mapping[str, str]) -> Iterator[Leaf]:
    """The leaves that remain when every choice takes the label it has in ``choices``; its first one when absent."""
    if isinstance(node, Leaf):
        yield node
    elif isinstance(node, Sum):
        for child in node.children:
            yield from reached(child, choices)
    else:
        label = choices.get(node.name, node.options[0][0])
        yield from reached(dict(node.options)[label], choices)
