"""Sites that an engine multiplies as one matrix: their leaves become one choice of a format that all of them take.

    Sum(block)                              Sum(block)
    ├── Leaf(q)   Leaf(k)   Leaf(v)    ->   ├── Choice(q+k+v): "4 bits …": Sum of Leaf(q), Leaf(k), Leaf(v), each with
    └── …                                   │                  its candidates of that format; "16 bits": …
                                            └── …

The recipes may still differ (one rounded, one fitted): what the engine sees is bits, groups and zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from layerwise.errors import InputError
from layerwise.plan.targets import Target, format_of
from layerwise.plan.tree import Allocation, Choice, Leaf, Node, Sum
from layerwise.recipe import surgery

MARK = "one format: "  # begins the names of choices that no plan file needs to know


def fused(tree: Node, target: Target, columns: Mapping[str, int]) -> Node:
    """The tree for a target; ``columns`` by site. Raises ``InputError`` where no format is offered to a whole group."""
    if isinstance(tree, Leaf) or not target.fused:
        return tree
    if isinstance(tree, Choice):
        return Choice(tree.name, tuple((label, fused(option, target, columns)) for label, option in tree.options))
    leaves = {child.name: child for child in tree.children if isinstance(child, Leaf)}
    groups = groups_among(leaves, target)
    whole = {name: members for members in groups for name in members}
    children: list[Node] = []
    for child in tree.children:
        members = whole.get(child.name)
        if not isinstance(child, Leaf) or members is None:
            children.append(fused(child, target, columns))
        elif child.name == members[0]:
            children.append(_choice([leaves[name] for name in members], target, columns))
    return Sum(tree.name, tuple(children))


def groups_among(names: Iterable[str], target: Target) -> list[tuple[str, ...]]:
    """The groups of two sites and more, of those named, that the engine multiplies as one matrix."""
    known = dict.fromkeys(names)
    found: list[tuple[str, ...]] = []
    for last in target.fused:
        for parent in dict.fromkeys(n.rpartition(".")[0] for n in known if n.rpartition(".")[2] in last):
            members = tuple(name for leaf in last if (name := f"{parent}.{leaf}") in known)
            if len(members) > 1:
                found.append(members)
    return found


def without_formats(allocation: Allocation) -> Allocation:
    """The allocation as the plain tree knows it."""
    return replace(allocation, choices={k: v for k, v in allocation.choices.items() if not k.startswith(MARK)})


def check_fused(recipes: Mapping[str, tuple[str, int]], target: Target) -> None:
    """``InputError`` for a group whose sites differ in format; ``recipes``: site -> (recipe, columns)."""
    for members in groups_among(recipes, target):
        formats = {name: format_of(*recipes[name]) for name in members}
        if len(set(formats.values())) > 1:
            listed = ", ".join(f"{name.rpartition('.')[2]} {form}" for name, form in formats.items())
            raise InputError(
                f"the plan gives {members[0].rpartition('.')[0]} {listed}, but {target.name} multiplies these as one "
                f"matrix; give them one format"
            )


def _choice(leaves: list[Leaf], target: Target, columns: Mapping[str, int]) -> Node:
    by_format: list[dict[str, list[int]]] = []
    for leaf in leaves:
        places: dict[str, list[int]] = {}
        for place, candidate in enumerate(leaf.candidates):
            gone = surgery(candidate.recipe) is not None
            places.setdefault("gone" if gone else format_of(candidate.recipe, columns[leaf.name]), []).append(place)
        by_format.append(places)
    shared = [label for label in by_format[0] if all(label in places for places in by_format)]
    names = ", ".join(leaf.name.rpartition(".")[2] for leaf in leaves)
    parent = leaves[0].name.rpartition(".")[0]
    if not shared:
        raise InputError(
            f"{target.name} multiplies {names} of {parent} as one matrix, and no format is offered to all of them; "
            f"leave out --keep or --fix there, or name techniques with more formats"
        )
    options = tuple(
        (
            label,
            Sum(
                parent,
                tuple(
                    replace(leaf, candidates=tuple(leaf.candidates[i] for i in places[label]))
                    for leaf, places in zip(leaves, by_format, strict=True)
                ),
            ),
        )
        for label in shared
    )
    return options[0][1] if len(options) == 1 else Choice(f"{MARK}{parent}: {names}", options)
