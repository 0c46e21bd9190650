"""What rules read off a real network: figures, where they come from, and the commands that plan with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.command import SMALL, layerwise
from tests.measures import measures_of

from layerwise.acts.kept import statistics_file
from layerwise.acts.measuring import NetworkMeasures, above_one_deviation
from layerwise.acts.removal import measure_on_steer
from layerwise.calibrate.kept import load_statistics
from layerwise.errors import InputError
from layerwise.recipe import parse_allocator
from layerwise.sensitivity.kronecker import damage

RTN = ("rtn:bits=3,group=32", "rtn:bits=6,group=32", "awq:steps=3+rtn:bits=3,group=32")


@pytest.fixture(scope="module")
def measures(tiny_llama: Path, sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetworkMeasures]:
    work = tmp_path_factory.mktemp("measures") / "work"
    with measures_of(tiny_llama, sentences, work, RTN, "6.5bpw") as found:
        yield found


def test_scores_are_those_of_the_stored_change(measures: NetworkMeasures) -> None:
    scores = measures.scores("curvature")
    network, found = measures.candidates.network, measures.candidates.sites
    assert set(scores) == {name for name, site in found.items() if site.reached and site.site.searched}
    name = next(n for n in scores if found[n].site.kind == "linear")
    for recipe in (c.recipe for c in found[name].of("as is")):
        change = found[name].fetch(recipe).decode() - network.read_site(found[name].site)
        known = load_statistics(statistics_file(measures.candidates.folder, name, "as is"))
        assert scores[name][recipe] == pytest.approx(damage(change, known), rel=1e-9)
    assert any(recipe.startswith("awq") for recipe in scores[name]), "rewritten candidates against rewritten weights"
    for candidate in found[name].candidates:  # the same on the judge split alone, within the noise of the tokens
        assert scores[name][candidate.recipe] == pytest.approx(candidate.damage, rel=0.6, abs=1e-6)


def test_the_pass_finds_what_the_kept_statistics_say(measures: NetworkMeasures, tmp_path: Path) -> None:
    kept = measures.hessians()
    assert set(kept) == set(measures.scores("curvature")) and all(h.eigenvalue > h.mean > 0 for h in kept.values())
    elsewhere = replace(measures, candidates=replace(measures.candidates, folder=tmp_path), stage="again")
    passed = elsewhere.hessians()
    for site, figures in kept.items():
        assert passed[site].eigenvalue == pytest.approx(figures.eigenvalue, rel=1e-4)
        assert passed[site].mean == pytest.approx(figures.mean, rel=1e-5)


def test_blocks_turn_their_input_and_hold_weights_above_a_deviation(measures: NetworkMeasures) -> None:
    blocks = measures.candidates.network.tree.blocks
    assert list(measures.influence()) == list(measures.outliers()) == list(blocks)
    assert all(0 < value < 2 for value in measures.influence().values())
    normal = torch.randn(400, 500, generator=torch.Generator().manual_seed(0))
    assert above_one_deviation([normal[:100], normal[100:]]) == pytest.approx(0.1587, abs=0.003)
    assert above_one_deviation([3 * normal]) == pytest.approx(above_one_deviation([normal]), abs=1e-4)
    skewed = normal.exp()
    assert above_one_deviation([-skewed]) != pytest.approx(above_one_deviation([skewed]), abs=0.01), "one-sided"


def test_rises_are_runs_of_the_network(measures: NetworkMeasures, monkeypatch: pytest.MonkeyPatch) -> None:
    linears = [s for n, s in measures.candidates.sites.items() if s.site.kind == "linear"]
    one, two = linears[0], linears[-1]
    recipe = "rtn:bits=3,group=32"
    alone = measures.rises(
        [{one.site.name: recipe}, {two.site.name: recipe}, {s.site.name: recipe for s in (one, two)}]
    )
    changes = [(s.site.name, s.fetch(recipe)) for s in (one, two)]
    assert alone[:2] == pytest.approx(measure_on_steer(measures.calibration, changes), rel=1e-9)
    assert max(alone[:2]) < alone[2] < 2 * sum(alone[:2])
    (nothing,) = measures.rises([{}])
    assert nothing == pytest.approx(0, abs=1e-9)
    monkeypatch.setattr("layerwise.acts.measuring.changed_on_steer", None)
    assert measures.rises([{one.site.name: recipe}]) == alone[:1], "journaled"
    with pytest.raises(InputError, match="cannot be measured alone"):
        measures.rises([{one.site.name: "awq:steps=3+rtn:bits=3,group=32"}])


@pytest.mark.parametrize(
    "rule", ["hawq", "hawq:rule=knapsack", "layerwise_quant:score=zd", "aptq_trace", "high_impact_ratio"]
)
def test_every_rule_plans_a_network(rule: str, measures: NetworkMeasures) -> None:
    tree, allocator = measures.candidates.tree(), parse_allocator(rule)
    low, high = (sum(f(c.bytes for c in s.candidates) for s in measures.candidates.sites.values()) for f in (min, max))
    for share in (0.05, 0.4):
        budget = int(low + share * (high - low))
        found = allocator.allocate(tree, budget, measures)
        assert set(found.sites) == set(measures.candidates.sites) and found.bytes <= budget


def test_rules_are_compared_on_the_same_candidates(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    shared = ("--calibrate", sentences, *SMALL, "--work", tmp_path / "work")
    techniques = ("--budget", "6.5bpw", "--techniques", "rtn")
    done = layerwise(
        "compare", tiny_llama, *techniques, "--allocators", "pareto,layerwise_quant:score=zd,adaquant_ip", *shared,
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = done.json
    assert [m["technique"] for m in found["methods"]] == ["pareto", "layerwise_quant:score=zd", "adaquant_ip"]
    assert all(m["bytes"] <= found["budget"] and m["metrics"]["kl"] > 0 for m in found["methods"])
    assert found["methods"][0]["predicted"] <= min(m["predicted"] for m in found["methods"])


def test_compress_plans_by_a_rule(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    given = ("--calibrate", sentences, *SMALL, "--techniques", "rtn", "--no-baseline")
    done = layerwise("compress", tiny_llama, tmp_path / "out", "--budget", "6.5bpw", "--allocator", "hawq", *given)
    assert done.code == 0, done.err
    assert "--allocator hawq" in (tmp_path / "out" / "evidence.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--budget", "5bpw", "--allocator", "rtn"), "'rtn' plans nothing"),
        (("--budget", "5bpw", "--allocator", "hawq:levels=4/2"), "rising bits"),
        (("--quality-loss", "1%", "--allocator", "hawq"), "give it a --budget"),
    ],
)
def test_mistakes_end_in_one_sentence(words: tuple[str, ...], said: str, tiny_llama: Path, tmp_path: Path) -> None:
    done = layerwise("compress", tiny_llama, tmp_path / "out", *words)
    assert done.code == 2 and len(done.sentences) == 1 and said in done.sentences[0], done.err
