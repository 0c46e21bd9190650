"""Published allocation rules: their algebra on networks whose loss is known, and what each idea is worth there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from tests.plan.figures import MadeUp
from tests.plan.reference import milp_damage
from tests.plan.trees import block_tree, network_tree

from layerwise.errors import InputError
from layerwise.plan import high_impact_ratio
from layerwise.plan.adaquant_ip import rises
from layerwise.plan.inter_layer import interactions
from layerwise.plan.measures import Place, asked
from layerwise.plan.order import _scored, candidate_at, level_of, read_levels, settled
from layerwise.plan.tree import Allocation, Candidate, Leaf, Sum, leaves
from layerwise.recipe import parse_allocator
from layerwise.sensitivity.hessian import Hessian

WIDTHS = (2, 4, 8)
WEIGHTS = 800


@dataclass(frozen=True)
class Quadratic(MadeUp):
    """A network whose loss is ``d^T A d``, where site i lowered to b bits moves by ``d_i = u_i 4^-b``."""

    curvature: Any = None  # A, positive semidefinite
    moves: Any = None  # u

    @property
    def places(self) -> Mapping[str, Place]:  # type: ignore[override]
        return {leaf.name: Place(WEIGHTS, f"block {i // 3}") for i, leaf in enumerate(leaves(self.tree))}

    def hessians(self) -> Mapping[str, Hessian]:
        return {leaf.name: Hessian(*[2 * self.curvature[i, i]] * 3) for i, leaf in enumerate(leaves(self.tree))}

    def scores(self, scorer: str) -> Mapping[str, Mapping[str, float]]:
        return {
            leaf.name: {c.recipe: self.alone(i, c.recipe) for c in leaf.candidates}
            for i, leaf in enumerate(leaves(self.tree))
        }

    def alone(self, site: int, recipe: str) -> float:
        return float(self.curvature[site, site] * self.moved(site, recipe) ** 2)

    def moved(self, site: int, recipe: str) -> float:
        return float(self.moves[site] * 4.0 ** -int(recipe.rpartition("=")[2]))

    def rises(self, changes: Sequence[Mapping[str, str]]) -> list[float]:
        names = [leaf.name for leaf in leaves(self.tree)]
        found = []
        for change in changes:
            d = np.array([self.moved(i, change[n]) if n in change else 0.0 for i, n in enumerate(names)])
            found.append(float(d @ self.curvature @ d))
        return found

    def loss(self, allocation: Allocation) -> float:
        return self.rises([{site: c.recipe for site, c in allocation.sites.items()}])[0]


def quadratic(seed: int, sites: int = 9, meeting: float = 1.0) -> Quadratic:
    """Sites of one size; ``meeting`` scales how much errors of different sites meet."""
    generator = np.random.default_rng(seed)
    factor = generator.normal(size=(sites, 4)) * np.exp(generator.normal(0, 0.5, (sites, 1)))
    curvature = factor @ factor.T
    diagonal = np.diag(np.diag(curvature))
    made = tuple(
        Leaf(f"s{i}", tuple(Candidate(f"rtn:bits={b}", WEIGHTS * b // 8, 4.0**-b) for b in WIDTHS))
        for i in range(sites)
    )
    moves = np.exp(generator.normal(0, 0.3, sites))
    return Quadratic(Sum("network", made), meeting * curvature + (1 - meeting) * diagonal, moves)


def plan(text: str, measures: MadeUp, budget: int) -> Allocation:
    return parse_allocator(text).allocate(measures.tree, budget, measures)


def between(measures: Quadratic, share: float) -> int:
    """A budget between all sites at 2 bits and all at 4."""
    return int(len(list(leaves(measures.tree))) * WEIGHTS * (2 + 2 * share) / 8)


def bits(allocation: Allocation) -> dict[str, int]:
    return {site: int(c.recipe.rpartition("=")[2]) for site, c in allocation.sites.items()}


# ---------------------------------------------------------------- levels


def test_a_level_is_the_smallest_candidate_of_so_many_bits() -> None:
    leaf = Leaf("s", tuple(Candidate(f"c{b}", b, 1.0) for b in (210, 260, 410, 1600)))  # 800 weights
    assert [candidate_at(leaf, b, 800).bytes for b in (1, 2, 2.2, 4, 4.2, 16, 20)] == [
        210,
        210,
        260,
        410,
        1600,
        1600,
        1600,
    ]


@pytest.mark.parametrize("text", ["2", "4/2", "2/x", "0/4", "", "2/2"])
def test_levels_must_rise(text: str) -> None:
    with pytest.raises(InputError, match="rising bits"):
        read_levels("hawq", text)


def test_a_rule_without_measures_and_a_name_that_is_no_rule_are_refused() -> None:
    with pytest.raises(InputError, match="give allocate its measures"):
        asked(None, "hawq")
    with pytest.raises(InputError, match="'rtn' plans nothing; the allocators are adaquant_ip"):
        parse_allocator("rtn")
    with pytest.raises(InputError, match="'hawk' does not exist"):
        parse_allocator("hawk")


def test_the_smallest_way_to_write_a_block_is_taken_and_none_is_taken_out() -> None:
    tree = block_tree()
    node, choices = settled(tree)
    assert choices == {"layer.0": "as is", "layer.1": "as is"}
    assert level_of(node, 2, MadeUp(tree).places)["layer.0.query"].recipe.startswith("rtn")


# ---------------------------------------------------------------- orders


@pytest.mark.parametrize("text", ["layerwise_quant", "layerwise_quant:score=zd", "aptq_trace", "hawq", "inter_layer"])
def test_plans_of_growing_budgets_are_nested_and_end_at_uniform_ones(text: str) -> None:
    measures = quadratic(1)
    name = text if ":" in text else f"{text}:levels=2/4/8"
    found = [bits(plan(name, measures, between(measures, share))) for share in np.linspace(0, 1, 12)]
    assert set(found[0].values()) == {2} and set(found[-1].values()) == {4}
    assert set(bits(plan(name, measures, between(measures, 100))).values()) == {8}
    for before, after in pairwise(found):
        assert all(after[site] >= before[site] for site in before)


def test_layerwise_quant_raises_whole_blocks_by_either_score() -> None:
    measures = quadratic(2)
    for score, first in (("lim", "block 0"), ("zd", "block 2")):
        got = bits(plan(f"layerwise_quant:score={score}", measures, between(measures, 0.4)))
        raised = {measures.places[site].block for site, b in got.items() if b == 4}
        assert raised == {first}, "LIM: the block that turns its input most; ZD: the fewest outlying weights"
        assert all(b == 4 for site, b in got.items() if measures.places[site].block == first)


def test_hawq_gives_the_sharper_site_at_least_as_many_bits() -> None:
    for kind in ("eigenvalue", "trace"):
        measures = quadratic(3)
        got = bits(plan(f"hawq:kind={kind}", measures, between(measures, 0.5)))
        sharp = parse_allocator(f"hawq:kind={kind}").sharpness(measures)  # type: ignore[attr-defined]
        assert all(got[a] >= got[b] for a, b in combinations(sorted(sharp, key=lambda s: -sharp[s]), 2))
        assert len(set(got.values())) == 2


def test_the_hessian_order_beats_its_reverse_where_the_loss_is_the_hessian() -> None:
    """Ablation: the same plan with the order turned round."""
    won = 0
    for seed in range(20):
        measures = quadratic(seed, meeting=0.0)
        mine = plan("hawq", measures, between(measures, 0.5))
        turned = Quadratic(measures.tree, np.diag(1 / np.diag(measures.curvature)), measures.moves)
        won += measures.loss(mine) < measures.loss(plan("hawq", turned, between(measures, 0.5)))
    assert won >= 19


# ---------------------------------------------------------------- sums


@pytest.mark.parametrize("text", ["adaquant_ip", "hawq:rule=knapsack"])
def test_the_integer_program_is_solved_exactly(text: str) -> None:
    tree = network_tree(8, 5, seed=4)
    measures, rule = MadeUp(tree), parse_allocator(text)
    scores = rises(tree, measures) if text == "adaquant_ip" else measures.scores("hessian_norm")
    large = {site: {recipe: 1e6 * v for recipe, v in found.items()} for site, found in scores.items()}  # absolute gaps
    for budget in (12_000_000, 20_000_000, 60_000_000):
        got = rule.objective(tree, rule.allocate(tree, budget, measures), measures)
        assert 1e6 * got == pytest.approx(milp_damage(_scored(tree, large), budget)[0], rel=1e-5)


def test_measured_rises_beat_what_each_site_was_predicted_to_do() -> None:
    """AdaQuant's idea: where predictions know nothing of the loss, measuring one site at a time does."""
    won = 0
    for seed in range(20):
        measures = quadratic(seed, meeting=0.2)
        budget = between(measures, 0.6)
        measured, blind = plan("adaquant_ip", measures, budget), plan("pareto", measures, budget)
        won += measures.loss(measured) < measures.loss(blind)
    assert won >= 17


# ---------------------------------------------------------------- cross terms


def test_interactions_are_exact_on_a_quadratic_loss() -> None:
    measures = quadratic(5)
    lowered = {leaf.name: "rtn:bits=2" for leaf in leaves(measures.tree)}
    pairs, rest = interactions(measures, lowered, "pairs"), interactions(measures, lowered, "rest")
    assert [rest[s] for s in lowered] == pytest.approx([pairs[s] for s in lowered], rel=1e-9)
    alone = measures.rises([{site: recipe} for site, recipe in lowered.items()])
    (whole,) = measures.rises([lowered])
    assert sum(alone) + sum(pairs.values()) / 2 == pytest.approx(whole, rel=1e-9)
    d = [measures.moved(i, "rtn:bits=2") for i in range(len(lowered))]
    assert pairs["s0"] == pytest.approx(2 * sum(d[0] * measures.curvature[0, j] * d[j] for j in range(1, 9)), rel=1e-9)
    assert set(interactions(measures, lowered, "none").values()) == {0.0}


def test_cross_terms_find_the_sites_whose_errors_add_up() -> None:
    """Ablation: cross=none is the order of the Hessian alone, which sees nine sites of about the same sharpness."""
    with_terms, without = [], []
    for seed in range(20):
        measures = adding_up(seed)
        with_terms.append(measures.loss(plan("inter_layer", measures, between(measures, 0.5))))
        without.append(measures.loss(plan("inter_layer:cross=none", measures, between(measures, 0.5))))
    assert np.mean(np.log(with_terms)) < np.mean(np.log(without)) - 0.1


def adding_up(seed: int) -> Quadratic:
    """Four of nine sites push the output the same way; all are about as sharp."""
    plain, generator = quadratic(seed), np.random.default_rng(seed)
    together = np.isin(np.arange(9), generator.permutation(9)[:4]).astype(float)
    curvature = np.diag(1 + 0.2 * generator.random(9)) + 0.8 * (np.outer(together, together) - np.diag(together))
    return Quadratic(plain.tree, curvature, np.ones(9))


# ---------------------------------------------------------------- the quadratic program


def test_the_program_meets_its_optimality_conditions() -> None:
    generator = np.random.default_rng(0)
    factor = generator.normal(size=(6, 6))
    shared, gain, extra = factor @ factor.T / 6, -1 - generator.random(6), 1 + generator.random(6)
    for room in (0.5, 2.0, 5.0):
        r = high_impact_ratio.shares_within(gain, shared, extra, room)
        assert extra @ r <= room + 1e-6
        price = -(gain + shared @ r) / extra
        inside = (r > 1e-4) & (r < 1 - 1e-4)
        if inside.sum() > 1:
            assert np.ptp(price[inside]) < 1e-3, "one price of a byte"
        if inside.any():
            mean = price[inside].mean()
            assert (price[r <= 1e-4] <= mean + 1e-3).all() and (price[r >= 1 - 1e-4] >= mean - 1e-3).all()


def test_equal_sites_share_equally_and_negative_curvature_is_given_up() -> None:
    r = high_impact_ratio.shares_within(-np.ones(4), 0.5 * np.eye(4), np.ones(4), 1.0)
    assert r == pytest.approx([0.25] * 4, abs=1e-5)
    fixed = high_impact_ratio.semidefinite(np.array([[0.0, 1.0], [1.0, 0.0]]))
    assert np.linalg.eigvalsh(fixed).min() >= -1e-12


def test_the_model_is_what_was_measured_and_ends_at_the_two_levels() -> None:
    measures = quadratic(6)
    rule = parse_allocator("high_impact_ratio:reach=9")
    node, _ = settled(measures.tree)
    low, high = level_of(node, 2, measures.places), level_of(node, 4, measures.places)
    gain, _ = rule.model(low, high, measures)  # type: ignore[attr-defined]
    start, raised = measures.rises(
        [{s: c.recipe for s, c in low.items()}, {s: (high if s == "s2" else low)[s].recipe for s in low}]
    )
    assert gain[2] == pytest.approx(raised - start, rel=1e-9)
    assert set(bits(plan("high_impact_ratio", measures, between(measures, 0))).values()) == {2}


def test_the_quadratic_program_beats_the_linear_one_where_errors_meet() -> None:
    """Ablation: cross=false leaves Q out."""
    full, linear = [], []
    for seed in range(12):
        measures = quadratic(seed)
        budget = between(measures, 0.4)
        full.append(measures.loss(plan("high_impact_ratio:reach=9", measures, budget)))
        linear.append(measures.loss(plan("high_impact_ratio:cross=false", measures, budget)))
    assert np.mean(np.log(full)) < np.mean(np.log(linear))
