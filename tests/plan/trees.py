"""Trees for the planner's tests: random, and alike the ones that networks give."""

from __future__ import annotations

import numpy as np

from layerwise.plan.tree import Allocation, Candidate, Choice, Leaf, Node, Sum, leaves


def network_tree(sites: int, candidates: int, seed: int) -> Sum:
    """Leaves of random sizes with bytes and damages as quantization gives them; the last candidate is 16 bits."""
    generator = np.random.default_rng(seed)
    made = []
    for i in range(sites):
        parameters = int(generator.integers(10_000, 10_000_000))
        sensitivity = float(np.exp(generator.normal(0, 1.5)))
        chosen = []
        for j, bits in enumerate(np.linspace(1.6, 8.5, candidates - 1)):
            size = int(parameters * bits / 8) + int(generator.integers(0, 200))
            damage = sensitivity * 4.0**-bits * float(np.exp(generator.normal(0, 0.1)))
            chosen.append(Candidate(f"recipe{j}", size, damage))
        made.append(Leaf(f"site{i}", (*chosen, Candidate("dense", 2 * parameters, 0.0))))
    return Sum("network", tuple(made))


def random_tree(generator: np.random.Generator, depth: int = 3) -> Node:
    """A small tree of any shape, with ties, tiny and huge damages, and dominated candidates."""
    count = 0

    def leaf(name: str) -> Leaf:
        largest = (6, 50, 1_000_000)[generator.integers(3)]
        kinds = (
            lambda: float(generator.integers(0, 5)),
            lambda: round(float(generator.random()), 1),
            lambda: float(np.exp(generator.normal(0, 8))),
        )
        return Leaf(
            name,
            tuple(
                Candidate(f"c{j}", int(generator.integers(0, largest)), kinds[generator.integers(3)]())
                for j in range(generator.integers(1, 5))
            ),
        )

    def grow(left: int) -> Node:
        nonlocal count
        count += 1
        name, kind = f"n{count}", int(generator.integers(3)) if left else 0
        if kind == 0:
            return leaf(name)
        if kind == 1:
            return Sum(name, tuple(grow(left - 1) for _ in range(generator.integers(1, 4))))
        return Choice(name, tuple((f"o{j}", grow(left - 1)) for j in range(generator.integers(1, 4))))

    return grow(depth)


def every_plan(node: Node) -> list[Allocation]:
    """All allocations of a small tree."""
    if isinstance(node, Leaf):
        return [Allocation({node.name: c}, {}) for c in node.candidates]
    if isinstance(node, Choice):
        return [
            Allocation(a.sites, {**a.choices, node.name: label})
            for label, option in node.options
            for a in every_plan(option)
        ]
    plans = [Allocation({}, {})]
    for child in node.children:
        more = every_plan(child)
        plans = [Allocation({**a.sites, **b.sites}, {**a.choices, **b.choices}) for a in plans for b in more]
    return plans


def plan_count(node: Node) -> int:
    if isinstance(node, Leaf):
        return len(node.candidates)
    if isinstance(node, Choice):
        return sum(plan_count(option) for _, option in node.options)
    product = 1
    for child in node.children:
        product *= plan_count(child)
    return product


def size_range(tree: Node) -> tuple[int, int]:
    """Smallest and largest bytes of a tree without choices."""
    return (
        sum(min(c.bytes for c in leaf.candidates) for leaf in leaves(tree)),
        sum(max(c.bytes for c in leaf.candidates) for leaf in leaves(tree)),
    )


def block_tree() -> Sum:
    """Two blocks with and without a rewrite, and a table."""

    def block(name: str, prefix: str, factor: float) -> Sum:
        return Sum(
            name,
            tuple(
                Leaf(
                    f"{name}.{part}",
                    tuple(
                        Candidate(f"{prefix}rtn:bits={bits},group=64", 100 * bits + extra, factor * 4.0**-bits)
                        for bits in (2, 3, 4, 8)
                    )
                    + (Candidate("dense", 1600, 0.0),),
                )
                for part, extra in (("query", 0), ("dense", 7))
            ),
        )

    choices = tuple(
        Choice(name, (("as is", block(name, "", 1.0)), ("awq", block(name, "awq+", factor))))
        for name, factor in (("layer.0", 0.5), ("layer.1", 2.0))
    )
    table = Leaf(
        "embeddings",
        tuple(Candidate(f"rtn:bits={bits},group=64", 200 * bits, 0.3 * 4.0**-bits) for bits in (2, 4, 8))
        + (Candidate("dense", 3200, 0.0),),
    )
    return Sum("network", (table, *choices))
