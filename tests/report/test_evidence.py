"""The schema: what is written reads back, and what is wrong is named."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from tests.report.example_evidence import bare_evidence, decoder_evidence, encoder_evidence, hostile_evidence

from layerwise.errors import InputError
from layerwise.report.evidence import (
    check_evidence,
    evidence_from_json,
    evidence_to_json,
    low_coverage,
    read_evidence,
    write_evidence,
)


@pytest.mark.parametrize("make", [encoder_evidence, decoder_evidence, hostile_evidence, bare_evidence])
def test_reads_back_what_it_wrote(make: Any, tmp_path: Path) -> None:
    evidence = make()
    write_evidence(evidence, tmp_path / "evidence.json")
    assert read_evidence(tmp_path) == read_evidence(tmp_path / "evidence.json") == evidence


def test_figures_that_are_not_finite_become_null() -> None:
    evidence = encoder_evidence()
    evidence["rows"][1]["quality"]["perplexity"] = {"value": math.inf}
    text = evidence_to_json(evidence)
    assert evidence_from_json(text)["rows"][1]["quality"]["perplexity"]["value"] is None
    json.loads(text, parse_constant=lambda name: pytest.fail(name))


def _without(key: str) -> Any:
    return lambda e: e.pop(key)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_without("format"), "format"),
        (lambda e: e.update(version=2), "version 2"),
        (_without("network"), "lacks 'network'"),
        (lambda e: e["network"].pop("class"), "lacks 'class'"),
        (lambda e: e["network"].update(parameters=0), "at least 1"),
        (lambda e: e["network"].update(parameters=True), "whole number"),
        (lambda e: e["sites"][3].update(bytes="many"), r"sites\[3\].bytes must be a whole number"),
        (lambda e: e["sites"][3].update(kind="tensor"), r"sites\[3\].kind"),
        (lambda e: e["sites"][0].update(damage=math.nan), r"sites\[0\].damage must be a finite number"),
        (lambda e: e["sites"][5].update(next_better={"recipe": "rtn"}), r"sites\[5\].next_better lacks 'bytes'"),
        (lambda e: e["rows"].pop(1), "'dense' and 'plan'"),
        (lambda e: e["rows"][1]["quality"].update(kl=3), "must be an object"),
        (lambda e: e["front"][0]["recipes"].pop(), "one entry per site"),
        (lambda e: e["front"][0]["recipes"].__setitem__(0, 99), "indices into recipe_names"),
        (lambda e: e["front"][0]["site_damage"].pop(), "one entry per site"),
        (lambda e: e.update(sampled={}), "sampled must be a list"),
        (lambda e: e["seconds"].update(total="long"), "seconds.total"),
    ],
)
def test_names_what_is_wrong(spoil: Any, named: str) -> None:
    evidence = copy.deepcopy(encoder_evidence())
    spoil(evidence)
    with pytest.raises(InputError, match=named):
        check_evidence(evidence)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"format": "other"}', b"[" * 100_000])
def test_refuses_files_that_are_not_evidence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "evidence.json").write_bytes(content)
    with pytest.raises(InputError):
        read_evidence(tmp_path)


def test_names_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"evidence\.json"):
        read_evidence(tmp_path)


def test_low_coverage_is_a_note_or_too_few_tokens() -> None:
    site = {"kind": "linear", "tokens": 100, "columns": 384, "note": ""}
    assert low_coverage(site) == "100 tokens for 384 inputs"
    assert low_coverage(site | {"tokens": 384}) is None
    assert low_coverage(site | {"kind": "table"}) is None
    assert low_coverage(site | {"tokens": 384, "note": "shrunk"}) == "shrunk"
