"""The planner against every plan there is, against an integer program, and where it is hardest."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from tests.plan.reference import milp_damage
from tests.plan.trees import block_tree, every_plan, network_tree, plan_count, random_tree, size_range

from layerwise.errors import InputError
from layerwise.plan.pareto import GAP, Pareto, front
from layerwise.plan.tree import Candidate, Choice, Leaf, Node, Sum


@pytest.mark.parametrize("start", range(0, 300, 50))
def test_optimal_among_all_plans(start: int) -> None:
    """Least damage, then fewest bytes: compared exactly, ties, zeros and huge damages included."""
    for seed in range(start, start + 50):
        generator = np.random.default_rng(seed)
        tree = random_tree(generator)
        if plan_count(tree) > 1500:
            continue
        keys = sorted((plan.bytes, plan.damage) for plan in every_plan(tree))
        exact = [keys[i][0] for i in generator.integers(0, len(keys), 3)]
        budgets = [*exact, *(b + 1 for b in exact), 10**9]
        for budget, solution in zip(budgets, Pareto().solve(tree, budgets), strict=True):
            found = (solution.allocation.damage, solution.allocation.bytes)
            assert found == min((damage, size) for size, damage in keys if size <= budget)
            assert solution.gap == 0.0


@pytest.mark.parametrize("start", range(0, 60, 20))
def test_bytes_may_be_below_zero(start: int) -> None:
    """A block that is taken out takes its norms along, which a plan's fixed part had counted."""
    for seed in range(start, start + 20):
        generator = np.random.default_rng(seed)
        tree = shifted(random_tree(generator), 3)
        if plan_count(tree) > 1500:
            continue
        keys = sorted((plan.bytes, plan.damage) for plan in every_plan(tree))
        budgets = [keys[i][0] for i in generator.integers(0, len(keys), 3)]
        for budget, solution in zip(budgets, Pareto().solve(tree, budgets), strict=True):
            found = (solution.allocation.damage, solution.allocation.bytes)
            assert found == min((damage, size) for size, damage in keys if size <= budget)


def shifted(node: Node, fewer: int) -> Node:
    """The tree with so many bytes less at every candidate."""
    if isinstance(node, Leaf):
        return Leaf(node.name, tuple(replace(c, bytes=c.bytes - fewer) for c in node.candidates))
    if isinstance(node, Sum):
        return Sum(node.name, tuple(shifted(child, fewer) for child in node.children))
    return Choice(node.name, tuple((label, shifted(option, fewer)) for label, option in node.options))


@pytest.mark.parametrize("seed", range(3))
def test_as_good_as_the_integer_program(seed: int) -> None:
    tree = network_tree(12, 6, seed)
    low, high = size_range(tree)
    for share in (0.05, 0.3, 0.6):
        budget = int(low + share * (high - low))
        reference, _ = milp_damage(tree, budget, gap=1e-7)
        assert Pareto().allocate(tree, budget).damage == pytest.approx(reference, rel=1e-6)


def test_as_good_as_the_integer_program_with_choices() -> None:
    tree = block_tree()
    for budget in (1600, 2000, 3500, 6000):
        reference, _ = milp_damage(tree, budget)
        assert Pareto().allocate(tree, budget).damage == pytest.approx(reference, rel=1e-9)


def test_twenty_budgets_over_a_large_network() -> None:
    tree = network_tree(500, 12, seed=0)
    low, high = size_range(tree)
    budgets = [int(low + share * (high - low)) for share in np.linspace(0.0, 0.9, 20)]
    start = time.process_time()
    plans = front(tree, budgets)
    assert time.process_time() - start < 5
    damages = [plan.damage for plan in plans]
    assert damages == sorted(damages, reverse=True)
    assert all(plan.bytes <= budget for plan, budget in zip(plans, budgets, strict=True))
    assert plans[7] == Pareto().allocate(tree, budgets[7])


def test_every_budget_around_a_uniform_plan_is_monotone() -> None:
    tree = network_tree(60, 8, seed=5)
    low, high = size_range(tree)
    middle = (low + high) // 2
    damages = [Pareto().allocate(tree, middle + extra).damage for extra in range(-400, 400, 10)]
    assert damages == sorted(damages, reverse=True)


def proportional_tree(sites: int) -> Sum:
    """Damage in proportion to bytes, and a fixed part: relaxation says nothing about which plan is best."""
    generator = np.random.default_rng(1)
    made = []
    for i in range(sites):
        sizes = np.sort(generator.integers(10_000, 1_000_000, 6))
        candidates = [Candidate(f"c{j}", int(b), (1e6 - int(b)) * 1e-6 + 0.1) for j, b in enumerate(sizes)]
        made.append(Leaf(f"s{i}", (*candidates, Candidate("dense", 1_000_000, 0.0))))
    return Sum("network", tuple(made))


def test_thinned_fronts_stay_within_the_proved_gap() -> None:
    tree = proportional_tree(40)
    low, high = size_range(tree)
    budgets = [int(low + share * (high - low)) for share in (0.1, 0.5, 0.8)]
    for budget, solution in zip(budgets, Pareto(states=1000).solve(tree, budgets), strict=True):
        assert solution.allocation.bytes <= budget
        assert solution.gap <= GAP
        assert solution.least <= solution.allocation.damage


def test_ties_take_the_fewest_bytes_and_then_the_first() -> None:
    tree = Sum("n", (Leaf("a", (Candidate("x", 9, 1.0), Candidate("y", 7, 1.0), Candidate("z", 7, 1.0))),))
    assert Pareto().allocate(tree, 100).sites["a"].recipe == "y"


def test_damages_near_the_limits_of_floats() -> None:
    tiny = Sum("n", tuple(Leaf(f"s{i}", (Candidate("a", 1, 5e-324), Candidate("b", 2, 0.0))) for i in range(5)))
    assert [plan.damage for plan in front(tiny, [5, 7, 10])] == [25e-324, 15e-324, 0.0]
    huge = Sum("n", tuple(Leaf(f"s{i}", (Candidate("a", 1, 1e300), Candidate("b", 2, 1e-300))) for i in range(5)))
    assert [plan.damage for plan in front(huge, [9, 10])] == [1e300, 5e-300]


def test_empty_and_nested_sums() -> None:
    assert Pareto().allocate(Sum("nothing", ()), 0).sites == {}
    nested = Sum("n", (Sum("m", (Leaf("a", (Candidate("x", 1, 1.0),)), Sum("o", ()))),))
    assert list(Pareto().allocate(nested, 1).sites) == ["a"]


def test_a_block_may_be_dropped() -> None:
    """An alternative may hold no site at all; its damage then stands at a leaf of no bytes."""
    block = Sum("block", (Leaf("block.w", (Candidate("x", 10, 0.1), Candidate("y", 20, 0.0))),))
    dropped = Leaf("block (dropped)", (Candidate("drop", 0, 5.0),))
    tree = Choice("block", (("as is", block), ("drop", dropped)))
    assert [plan.choices["block"] for plan in front(tree, [0, 9, 10, 20])] == ["drop", "drop", "as is", "as is"]


def test_a_site_named_twice_is_refused() -> None:
    twice = Leaf("a", (Candidate("x", 1, 1.0),))
    with pytest.raises(InputError, match="named twice"):
        Pareto().allocate(Sum("n", (twice, twice)), 10)


def test_planning_loads_no_torch() -> None:
    program = (
        "import sys\n"
        "import layerwise.plan.pareto, layerwise.plan.budget, layerwise.plan.constraints, layerwise.plan.difference\n"
        "from layerwise.recipe import parse_recipe\n"
        "parse_recipe('rtn:bits=4')\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
