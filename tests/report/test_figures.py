"""Wording of figures, and the agreement between prediction and measurement."""

from __future__ import annotations

import pytest
from tests.report.example_evidence import bare_evidence, encoder_evidence

from layerwise.report.figures import (
    against_baseline,
    agreement,
    bits_of,
    comparison,
    duration,
    encoder_of,
    megabytes,
    outcome,
    parameters,
    significant,
    spearman,
)


def test_numbers_read_naturally() -> None:
    assert [megabytes(n) for n in (0, 999, 1_000, 12_744_000, 90_864_192, 999_600_000)] == [
        "0 B", "999 B", "1.00 kB", "12.7 MB", "90.9 MB", "1.00 GB",
    ]  # fmt: skip
    assert [significant(v) for v in (0.010234, 23.456, 0.0, 0.00001234, 12345.6, 0.9999, None)] == [
        "0.0102", "23.5", "0", "1.23e-05", "12,346", "1.00", "not finite",
    ]  # fmt: skip
    assert [duration(s) for s in (0.42, 8.2, 82, 250, 7_500)] == ["0.42 s", "8.2 s", "82 s", "4 min 10 s", "2 h 05 min"]
    assert [parameters(n) for n in (512, 22_713_216, 8_030_261_248)] == ["512", "22.7 M", "8.03 B"]


def test_outcome_is_the_one_line() -> None:
    evidence = encoder_evidence()
    evidence["rows"][1] |= {"bytes": 12_744_000, "bpw": 4.482}
    line = "22.7 M parameters, 90.9 MB → 12.7 MB (4.48 bpw), distance 0.0102 vs baseline 0.0431"
    assert outcome(evidence) == line
    assert outcome(bare_evidence()).endswith("bpw)")


def test_against_baseline_knows_the_direction() -> None:
    evidence = encoder_evidence()
    assert against_baseline(evidence, "distance") == ("76% below the baseline", True)
    assert against_baseline(evidence, "stsb_spearman") == ("0.57 above the baseline", True)
    evidence["rows"][1]["quality"]["distance"]["value"] = 0.2
    assert against_baseline(evidence, "distance") == ("4.6× the baseline", False)
    assert against_baseline(bare_evidence(), "distance") is None


def test_the_best_cell_is_never_the_dense_one() -> None:
    evidence = encoder_evidence()
    names, lines = comparison(evidence)
    best = {line.label: line.best for line in lines}
    assert names == ["dense", "plan", "baseline"]
    assert best["Embedding distance"] == 1 and best["STS-B Spearman"] == 1 and best["Size"] is None
    evidence["rows"][1]["quality"]["distance"]["value"] = 0.2
    assert {line.label: line.best for line in comparison(evidence)[1]}["Embedding distance"] == 2


def test_spearman_with_ties_and_without_meaning() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)  # scipy.stats.spearmanr
    assert spearman([1, 1, 1], [1, 2, 3]) is None and spearman([], []) is None


def test_agreement_overall_and_inside_each_width() -> None:
    pairs = [
        {"site": "a", "recipe": f"rtn:bits={b},group=64", "predicted": p, "measured": 1.2 * p}
        for b in (3, 2)
        for p in (1.0, 2.0, 4.0)
    ]
    groups = agreement(pairs)
    assert [(g.label, g.count) for g in groups] == [("all", 6), ("2 bits", 3), ("3 bits", 3)]
    assert all(g.median_ratio == pytest.approx(1.2) and g.spearman == pytest.approx(1.0) for g in groups)


def test_recipes_name_their_encoder_and_bits() -> None:
    assert encoder_of("awq+gptq:bits=4,group=32") == "gptq"
    assert [bits_of("awq+gptq:bits=4,group=32", 4.5), bits_of("fp16", 17.0), bits_of("odd", 3.2)] == ["4", "16", "3"]
