"""The laws that every registered allocator obeys."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
from tests.plan.figures import MadeUp
from tests.plan.trees import block_tree, every_plan, network_tree, plan_count, random_tree

from layerwise.errors import InputError
from layerwise.plan.tree import Allocation, Candidate, Choice, Leaf, Node, Sum, leaves, reached
from layerwise.roles import Allocator
from layerwise.technique import find, names

pytestmark = pytest.mark.parametrize("name", names(Allocator))

TREES: dict[str, Node] = {
    "blocks": block_tree(),
    "network": network_tree(40, 6, seed=1),
    "one site": Leaf("only", (Candidate("a", 10, 1.0), Candidate("b", 5, 2.0))),
    "identical sites": Sum(
        "network",
        tuple(Leaf(f"s{i}", tuple(Candidate(f"b{b}", 100 * b, 4.0**-b) for b in range(2, 9))) for i in range(30)),
    ),
    "nothing to lose": Sum("network", tuple(Leaf(f"s{i}", (Candidate("z", 3 + i, 0.0),)) for i in range(5))),
}


def make(name: str) -> Allocator:
    allocator = find(name)()
    assert isinstance(allocator, Allocator)
    return allocator


def allocate(name: str, tree: Node, budget: int) -> Allocation:
    return make(name).allocate(tree, budget, MadeUp(tree))


def objective(name: str, tree: Node, allocation: Allocation) -> float:
    return make(name).objective(tree, allocation, MadeUp(tree))


def not_worse(found: list[float]) -> bool:
    return all(after <= before + 1e-12 * abs(before) for before, after in pairwise(found))


def smallest(name: str, tree: Node) -> int:
    with pytest.raises(InputError) as caught:
        allocate(name, tree, -(1 << 60))
    return int(re.findall(r"smallest feasible budget is (\d+) bytes", str(caught.value))[0])


def budgets(name: str, tree: Node) -> list[int]:
    low = smallest(name, tree)
    high = sum(max(c.bytes for c in leaf.candidates) for leaf in leaves(tree))
    return sorted({low, low + 1, *(int(b) for b in np.linspace(low, high, 25)), high * 2})


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_the_budget_is_kept_and_one_candidate_is_chosen_at_each_site(name: str, tree: Node) -> None:
    for budget in budgets(name, tree):
        allocation = allocate(name, tree, budget)
        assert allocation.bytes <= budget
        check_complete(tree, allocation)


def check_complete(tree: Node, allocation: Allocation) -> None:
    there = {leaf.name: leaf for leaf in reached(tree, allocation.choices)}
    assert list(allocation.sites) == list(there)
    for site, candidate in allocation.sites.items():
        assert candidate in there[site].candidates


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_more_budget_is_never_worse(name: str, tree: Node) -> None:
    assert not_worse([objective(name, tree, allocate(name, tree, budget)) for budget in budgets(name, tree)])


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_same_input_same_plan(name: str, tree: Node) -> None:
    for budget in budgets(name, tree)[::6]:
        one, two = allocate(name, tree, budget), allocate(name, tree, budget)
        assert one == two
        assert list(one.sites) == list(two.sites)


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_an_infeasible_budget_names_the_smallest_feasible_one(name: str, tree: Node) -> None:
    low = smallest(name, tree)
    assert allocate(name, tree, low).bytes == low
    with pytest.raises(InputError, match=f"smallest feasible budget is {low} bytes"):
        allocate(name, tree, low - 1)


def test_choices_are_made_and_reported(name: str) -> None:
    tree = block_tree()
    for budget in budgets(name, tree):
        allocation = allocate(name, tree, budget)
        assert set(allocation.choices) == {"layer.0", "layer.1"}
        for block, label in allocation.choices.items():
            inside = [
                c.recipe for site, c in allocation.sites.items() if site.startswith(block) and c.recipe != "dense"
            ]
            assert all(recipe.startswith("awq+") == (label == "awq") for recipe in inside)


def test_small_random_trees_of_any_shape(name: str) -> None:
    for seed in range(60):
        generator = np.random.default_rng(seed)
        tree = random_tree(generator)
        if plan_count(tree) > 1000:
            continue
        plans = every_plan(tree)
        low = smallest(name, tree)
        found = []
        for budget in sorted({low, *(low + int(extra) for extra in generator.integers(0, 1_000_000, 3))}):
            allocation = allocate(name, tree, budget)
            assert allocation.bytes <= budget
            assert allocation in plans
            found.append(objective(name, tree, allocation))
        assert not_worse(found)


@pytest.mark.parametrize(
    "candidate", [Candidate("x", 1, -1.0), Candidate("x", 1, float("nan")), Candidate("x", 1, float("inf"))]
)
def test_impossible_candidates_are_refused_by_name(name: str, candidate: Candidate) -> None:
    with pytest.raises(InputError, match="site 'broken'"):
        allocate(name, Sum("n", (Leaf("broken", (candidate,)),)), 100)


def test_sites_and_choices_without_alternatives_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="no candidate"):
        allocate(name, Leaf("empty", ()), 100)
    with pytest.raises(InputError, match="no alternative"):
        allocate(name, Choice("empty", ()), 100)
