"""Rules that decide how sparse each matrix is: their algebra, and what each paper's idea is worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.measures import measures_of
from tests.plan.figures import MadeUp

from layerwise.acts.measuring import NetworkMeasures
from layerwise.acts.slopes import drawn, measure_slopes, of_sequences
from layerwise.errors import InputError
from layerwise.network.skeleton import materialised
from layerwise.plan.dimap import module_of, shared_out
from layerwise.plan.ecoflap import shares
from layerwise.plan.measures import Place
from layerwise.plan.tree import Allocation, Candidate, Leaf, Sum, leaves
from layerwise.recipe import parse_allocator

NAMES = [f"layers.{b}.{part}" for b in range(2) for part in ("attn.q_proj", "attn.o_proj", "mlp.fc1", "mlp.fc2")]


@dataclass(frozen=True)
class Layers(MadeUp):
    """Matrices whose candidates keep 1, 2, ... of their entries, a byte each."""

    magnitudes: Any = None  # site -> magnitudes, descending

    @property
    def places(self) -> Mapping[str, Place]:  # type: ignore[override]
        return {n: Place(len(m), n.rpartition(".")[0].rpartition(".")[0]) for n, m in self.magnitudes.items()}

    def energies(self) -> Mapping[str, Mapping[str, tuple[float, float]]]:
        return {
            name: {f"keep={k}": (float((m[k:] ** 2).sum()), float((m**2).sum())) for k in range(1, len(m) + 1)}
            for name, m in self.magnitudes.items()
        }


def layers(scales: Mapping[str, float] = {}, seed: int = 0) -> Layers:
    draw = np.random.default_rng(seed)
    sizes = np.exp(draw.normal(0, 0.6, len(NAMES)))
    found = {
        name: scales.get(name, 1.0) * size * np.sort(np.abs(draw.standard_t(4, 24 if "fc" in name else 12)))[::-1]
        for name, size in zip(NAMES, sizes, strict=True)
    }
    made = tuple(
        Leaf(n, tuple(Candidate(f"keep={k}", k, 1.0 / k) for k in range(1, len(m) + 1))) for n, m in found.items()
    )
    return Layers(Sum("network", made), found)


def kept(measures: Layers, text: str, budget: int) -> dict[str, int]:
    found = parse_allocator(text).allocate(measures.tree, budget, measures)
    assert found.bytes <= budget
    return {site: c.bytes for site, c in found.sites.items()}


def importance(magnitudes: Any) -> Any:
    """LAMP's score of each entry, magnitudes descending."""
    return magnitudes**2 / np.cumsum(magnitudes**2)


def by_threshold(scores: Mapping[str, Any], budget: int) -> dict[str, int]:
    """How many of each site's entries are among the ``budget`` highest scores of all."""
    order = sorted(((s, name) for name, found in scores.items() for s in found), reverse=True)[:budget]
    return {name: sum(1 for _, other in order if other == name) for name in scores}


@pytest.mark.parametrize("budget", [20, 60, 71, 100, 130])
def test_the_least_sum_is_one_threshold_over_all_weights(budget: int) -> None:
    measures = layers()
    found = kept(measures, "lamp", budget)
    assert found == by_threshold({n: importance(m) for n, m in measures.magnitudes.items()}, budget)
    plain = by_threshold({n: m**2 for n, m in measures.magnitudes.items()}, budget)
    if min(plain.values()) > 0:  # a candidate keeps one entry at least
        assert kept(measures, "lamp:score=magnitude", budget) == plain


def test_importance_as_the_card_has_it() -> None:
    magnitudes = layers().magnitudes[NAMES[0]]
    imp = importance(magnitudes)
    assert imp[0] == 1 and bool((np.diff(imp) < 0).all())
    for k in range(1, len(magnitudes)):
        share = (magnitudes[:k] ** 2).sum() / (magnitudes**2).sum()
        assert np.prod(1 - imp[k:]) == pytest.approx(share)


@pytest.mark.parametrize("rule", ["lamp", "dimap", "dimap:modules=false"])
def test_scales_that_cancel_change_nothing_but_global_magnitude(rule: str) -> None:
    """Ablation: without the layer's remaining squares beneath it, magnitude empties the layer that was scaled down."""
    scaled = {"layers.0.attn.q_proj": 10.0, "layers.0.attn.o_proj": 0.1}
    assert kept(layers(), rule, 70) == kept(layers(scaled), rule, 70)
    plain, moved = (kept(layers(s), "lamp:score=magnitude", 70) for s in ({}, scaled))
    assert moved["layers.0.attn.o_proj"] == 1 < plain["layers.0.attn.o_proj"]
    assert moved["layers.0.attn.q_proj"] > plain["layers.0.attn.q_proj"]


# ---------------------------------------------------------------- modules


def test_each_module_ranks_its_own_and_gets_as_much_a_weight() -> None:
    measures, budget = layers(), 72  # half of all entries
    found = kept(measures, "dimap", budget)
    modules: dict[str, list[str]] = {}
    for name in NAMES:
        modules.setdefault(module_of(name), []).append(name)
    assert set(modules) == {"qkv", "projection", "mlp"}
    for members in modules.values():
        scores = {n: importance(measures.magnitudes[n]) for n in members}
        half = sum(len(s) for s in scores.values()) // 2
        assert {n: found[n] for n in members} == by_threshold(scores, half)
    assert found != kept(measures, "dimap:modules=false", budget), "ablation: one ranking over all modules"
    assert kept(measures, "dimap:modules=false", budget) == kept(measures, "lamp", budget)


@pytest.mark.parametrize(
    ("site", "module"),
    [
        ("model.layers.3.self_attn.k_proj", "qkv"),
        ("model.layers.3.self_attn.o_proj", "projection"),
        ("model.layers.3.mlp.gate_proj", "mlp"),
        ("encoder.layer.0.attention.self.query", "qkv"),
        ("encoder.layer.0.attention.output.dense", "projection"),
        ("encoder.layer.0.intermediate.dense", "mlp"),
        ("encoder.layer.0.output.dense", "mlp"),
        ("transformer.h.1.attn.c_attn", "qkv"),
        ("transformer.h.1.attn.c_proj", "projection"),
        ("transformer.h.1.mlp.c_proj", "mlp"),
        ("vit.encoder.layer.1.attention.attention.value", "qkv"),
        ("layers.0.attn.qkv", "qkv"),
        ("layers.0.attn.proj", "projection"),
    ],
)
def test_a_module_is_known_by_its_path(site: str, module: str) -> None:
    assert module_of(site) == module


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 90), st.integers(1, 60)), min_size=1, max_size=5),
    st.integers(0, 400),
    st.integers(0, 100),
)
def test_shares_of_bytes_fit_and_grow(parts: list[tuple[int, int, int]], spare: int, more: int) -> None:
    ranges = {str(i): (low, low + span) for i, (low, span, _) in enumerate(parts)}
    weights = {str(i): weight for i, (_, _, weight) in enumerate(parts)}
    budget = sum(low for low, _ in ranges.values()) + spare
    one, two = shared_out(ranges, weights, budget), shared_out(ranges, weights, budget + more)
    assert sum(one.values()) <= budget
    assert all(ranges[n][0] <= one[n] <= two[n] <= ranges[n][1] for n in ranges)


# ---------------------------------------------------------------- coarse to fine


@given(
    st.lists(st.tuples(st.integers(1, 90), st.floats(0, 9)), min_size=1, max_size=6),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 0.5),
)
def test_places_fit_grow_and_do_not_fall_below_the_spread(
    parts: list[tuple[int, float]], one: float, two: float, spread: float
) -> None:
    ranges, scores = {str(i): n for i, (n, _) in enumerate(parts)}, {str(i): s for i, (_, s) in enumerate(parts)}
    whole = sum(ranges.values())
    less, more = (int(share * whole) for share in sorted((one, two)))
    before, after = (shares(ranges, scores, spare, spread) for spare in (less, more))
    assert sum(before[n] * ranges[n] for n in ranges) <= less + 1e-6
    assert all(before[n] <= after[n] + 1e-9 for n in ranges)
    assert all(-1e-9 + max(0, less / whole - spread) <= place <= 1 for place in before.values())


def test_equal_scores_and_sizes_are_equally_sparse() -> None:
    ranges = dict.fromkeys("abcd", 100)
    assert list(shares(ranges, dict.fromkeys("abcd", 2.0), 200, 0.1).values()) == pytest.approx([0.5] * 4)
    places = shares(ranges, {"a": 0.0, "b": 1.0, "c": 1.0, "d": 2.0}, 200, 0.1)
    assert [places[n] for n in "abcd"] == pytest.approx([0.4, 0.5, 0.5, 0.6])


@dataclass(frozen=True)
class Steep(Layers):
    """A network whose blocks differ in how steep the loss is; the loss is slope times what went, squared."""

    steepness: Any = None  # block -> slope

    def slopes(self, draws: int, size: float) -> Mapping[str, float]:
        return {name: self.steepness[place.block] for name, place in self.places.items()}

    def loss(self, allocation: Allocation) -> float:
        return sum(
            self.steepness[self.places[n].block] * (len(self.magnitudes[n]) - c.bytes) ** 2
            for n, c in allocation.sites.items()
        )


def test_steeper_blocks_keep_more_and_shuffled_scores_lose_it() -> None:
    known = layers()
    steep = Steep(known.tree, known.magnitudes, {"layers.0": 1.0, "layers.1": 6.0})
    turned = replace(steep, steepness={"layers.0": 6.0, "layers.1": 1.0})
    rule = parse_allocator("ecoflap:spread=0.2")
    found, shuffled = (rule.allocate(steep.tree, 72, measures) for measures in (steep, turned))
    even = rule.allocate(steep.tree, 72, replace(steep, steepness={"layers.0": 1.0, "layers.1": 1.0}))
    assert steep.loss(found) < steep.loss(even) < steep.loss(shuffled)
    assert all(abs(a.bytes - 72) <= 8 for a in (found, shuffled, even))
    for block in ("layers.0", "layers.1"):  # one sparsity in all matrices of a block, as near as counts allow
        places = [(c.bytes - 1) / (len(steep.magnitudes[n]) - 1) for n, c in found.sites.items() if block in n]
        assert max(places) - min(places) < 1 / 11 + 1e-9


def test_a_loss_that_nothing_moves_is_refused() -> None:
    known = layers()
    flat = Steep(known.tree, known.magnitudes, {"layers.0": 0.0, "layers.1": 0.0})
    with pytest.raises(InputError, match="no matrix whose move changes the loss"):
        parse_allocator("ecoflap").allocate(flat.tree, 72, flat)


# ---------------------------------------------------------------- figures of a real network

RECIPES = tuple(f"magnitude:sparsity={s},pattern=matrix" for s in (0.3, 0.6))


@pytest.fixture(scope="module")
def measures(tiny_llama: Path, sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetworkMeasures]:
    work = tmp_path_factory.mktemp("sparsities") / "work"
    with measures_of(tiny_llama, sentences, work, RECIPES, "9bpw") as found:
        yield found


def test_energies_are_those_of_what_is_stored(measures: NetworkMeasures) -> None:
    found = measures.energies()
    for name, site in measures.candidates.sites.items():
        weight = measures.candidates.network.read_site(site.site).double()
        for candidate in site.candidates:
            lost, whole = found[name][candidate.recipe]
            stored = site.fetch(candidate.recipe).decode().double()
            assert whole == pytest.approx(float(weight.square().sum()))
            assert lost == pytest.approx(float((stored - weight).square().sum()))
            if candidate.recipe.startswith("magnitude"):
                assert whole - lost == pytest.approx(float(stored.square().sum()), rel=1e-3)


def test_slopes_are_lengths_of_gradients(measures: NetworkMeasures) -> None:
    """E|z . g| = sqrt(2 / pi) ||g||, gradients by back-propagation on the same sequences and labels."""
    calibration = measures.calibration
    network, loss, draws = calibration.network.again(), calibration.loss, 16
    sites = [s.site for s in measures.candidates.sites.values() if s.site.block is not None][::5]
    found = measure_slopes(calibration, sites, draws, 1e-3, lambda: None)
    before = {s.name: network.read(s.parameter) for s in sites}
    dense = {n: network.read(n) for n, _ in network.module.named_parameters(remove_duplicate=False)}
    lengths: dict[str, list[float]] = {s.name: [] for s in sites}
    with materialised(network.module, dense) as module:
        for draw in range(draws):
            batch, _ = drawn(calibration, draw)
            given = {s.parameter: dense[s.parameter].clone().requires_grad_() for s in sites}
            out = torch.func.functional_call(module, given, (batch.tokens,), {"use_cache": False})
            target = loss.target(out, batch)
            direction = loss.direction(
                target.detach(), torch.Generator().manual_seed(calibration.seed * 1_000_003 + draw)
            )
            each = of_sequences((target.double() * direction.double()).sum(-1), loss, batch)
            for value in each[:2]:
                for site, g in zip(
                    sites, torch.autograd.grad(value, list(given.values()), retain_graph=True), strict=True
                ):
                    lengths[site.name].append(float(g.norm()))
    for site in sites:
        expected = (2 / np.pi) ** 0.5 * float(np.mean(lengths[site.name]))
        assert found[site.name] == pytest.approx(expected, rel=0.25)
        assert torch.equal(network.read(site.parameter), before[site.name]), "the stored matrix is not moved"


def test_slopes_and_energies_are_journaled(measures: NetworkMeasures, monkeypatch: pytest.MonkeyPatch) -> None:
    one = measures.slopes(1, 1e-2)
    monkeypatch.setattr("layerwise.acts.measuring.measure_slopes", None)
    assert measures.slopes(1, 1e-2) == one and all(value > 0 for value in one.values())
    reached = {n for n, s in measures.candidates.sites.items() if s.site.kind == "linear" and s.reached}
    assert set(one) == reached


@pytest.mark.parametrize("rule", ["lamp", "lamp:score=magnitude", "dimap", "ecoflap:draws=1"])
def test_rules_plan_a_real_network(rule: str, measures: NetworkMeasures) -> None:
    tree = measures.candidates.tree()
    sizes = [[c.bytes for c in leaf.candidates] for leaf in leaves(tree)]
    low, high = sum(map(min, sizes)), sum(map(max, sizes))
    found = parse_allocator(rule).allocate(tree, (low + high) // 2, measures)
    assert low <= found.bytes <= (low + high) // 2
    assert found.bytes > low + 0.5 * ((high - low) // 2)
    assert isinstance(next(iter(found.sites.values())), Candidate)


def test_a_matrix_of_zeros_costs_nothing(measures: NetworkMeasures) -> None:
    from layerwise.plan.energy import energy_costs

    class Zeros(Layers):
        def energies(self) -> Mapping[str, Mapping[str, tuple[float, float]]]:
            return {"a": {"r": (0.0, 0.0), "all": (2.0, 2.0), "more": (3.0, 2.0)}}

    costs = energy_costs(Zeros(Sum("n", ()), {}), "lamp")["a"]
    assert costs["r"] == 0 and costs["all"] == costs["more"] > 20
