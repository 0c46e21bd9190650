"""Evidence files: each parses, names a registered technique, and holds the command that makes it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from layerwise.evidence.rows import (
    FOLDER,
    Baseline,
    Evidence,
    Row,
    evidence_file,
    read_evidence,
    techniques_with_evidence,
    write_evidence,
)
from layerwise.jobs.bench import GROUNDLESS, ROLES, Bench, read_seeds
from layerwise.probe.cola import LENGTHS, UNMENDED
from layerwise.technique import find, names
from layerwise.trials.blueprints import METRICS as OF_BLUEPRINTS
from layerwise.trials.distillers import METRICS as OF_DISTILLERS
from layerwise.trials.generators import METRICS as OF_GENERATORS
from layerwise.trials.network_rewrites import EXACTNESS
from layerwise.trials.probes import METRIC
from layerwise.trials.searches import METRICS as OF_SEARCHES
from layerwise.trials.sparsifiers import METRICS as OF_SPARSIFIERS
from layerwise.trials.text_depths import METRICS as OF_TEXT_DEPTHS

TECHNIQUES = techniques_with_evidence()
METRICS = {
    "kl",
    "distance",
    "perplexity",
    EXACTNESS,
    METRIC,
    *OF_BLUEPRINTS,
    *OF_GENERATORS,
    *OF_DISTILLERS,
    *OF_SPARSIFIERS,
    *OF_SEARCHES,
    *OF_TEXT_DEPTHS,
    LENGTHS,
    UNMENDED,
}


def test_evidence_is_there() -> None:
    assert {"rtn", "gptq", "hqq", "two_sided", "awq", "pareto"} <= set(TECHNIQUES)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_file_names_a_registered_technique_and_its_paper(name: str) -> None:
    found = read_evidence(name)
    assert found is not None and found.technique == name and name in names()
    assert found.paper == find(name).paper
    assert find(name).role in {*ROLES, *GROUNDLESS}
    assert found.rows
    assert found.text() == evidence_file(name).read_text(encoding="utf-8")  # the form in which bench writes it


@pytest.mark.parametrize("name", TECHNIQUES)
def test_every_row_holds_the_command_that_makes_it(name: str) -> None:
    found = read_evidence(name)
    assert found is not None
    for row in found.rows:
        words = shlex.split(row.command)
        assert words[:2] == ["layerwise", "bench"] and words[2].partition(":")[0] == name
        given = dict(zip(words[3::2], words[4::2], strict=True))
        seeds = read_seeds(given.pop("--seeds"))
        options = {option.removeprefix("--"): value for option, value in given.items()}
        numbers = {key: int(options.pop(key)) for key in ("sequences", "length") if key in options}
        assert Bench(words[2], **options, **numbers, seeds=seeds).command() == row.command
        # What a generator learns from text takes minutes a seed.
        assert row.seeds == seeds and len(seeds) >= (1 if getattr(find(name), "learns", False) else 2)
        assert not any(word.startswith("/") for word in words), "a path of one machine"


@pytest.mark.parametrize("name", TECHNIQUES)
def test_rows_are_measurements(name: str) -> None:
    found = read_evidence(name)
    assert found is not None
    for row in found.rows:
        assert row.metric in METRICS or find(name).role == "generator"  # their trials name what they measure
        least = 0 if row.metric == METRIC else 1e-12  # ranks of few places can agree in full
        assert row.value >= least and row.baseline.value > 0 and 0 <= row.spread <= row.value
        assert row.bytes > 0 and row.baseline.bytes > 0
        assert {"python", "torch", "layerwise"} <= set(row.versions)
        same_setting = [other for other in found.rows if other.setting == row.setting]
        if find(name).role == "activation quantizer":  # the same weights on both sides; grids are a few hundred bytes
            continue
        if find(name).role == "search":  # all within one limit of parameters, and equal in cost rather than in bytes
            continue
        # Where no baseline has the same size (but for names in the header), there is one that is at least as large. A
        # network of another shape is held against others of its size, which are a few norms or thin factors apart.
        share = 0.98 if find(name).role == "network surgeon" else 0.999
        assert (
            any(other.baseline.bytes >= share * row.bytes for other in same_setting) or "planned" in row.baseline.recipe
        )


def row(network: str, setting: str, value: float) -> Row:
    return Row(
        network, "text", "kl", setting, 10, value, Baseline("rtn", 10, 2.0), (0, 1), 0.1, {"python": "3"}, "layerwise"
    )


def test_rows_replace_those_of_the_same_network_and_setting(tmp_path: Path) -> None:
    before = Evidence("rtn", "RTN", (row("a", "rtn:bits=4", 1.0), row("b", "rtn:bits=4", 2.0)))
    after = before.replacing([row("a", "rtn:bits=4", 3.0), row("a", "rtn:bits=3", 4.0)])
    assert [(r.network, r.value) for r in after.rows] == [("b", 2.0), ("a", 3.0), ("a", 4.0)]
    write_evidence(after, tmp_path)
    assert read_evidence("rtn", tmp_path) == after
    assert after.rows[0].ratio == pytest.approx(1.0)
    assert techniques_with_evidence(tmp_path) == ["rtn"] and read_evidence("gptq", tmp_path) is None


def test_a_file_of_another_form_is_named(tmp_path: Path) -> None:
    (tmp_path / "rtn.json").write_text(json.dumps({"technique": "rtn", "rows": []}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"rtn\.json is not an evidence file"):
        read_evidence("rtn", tmp_path)


def test_the_files_are_package_data() -> None:
    text = (FOLDER.parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"evidence/*.json"' in text
