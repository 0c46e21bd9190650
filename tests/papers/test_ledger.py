"""Statuses follow from what is registered and measured, and the committed ledger is the computed one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer.main
from tests.papers.evidence import of_awq

from layerwise.cli.main import app
from layerwise.errors import InputError
from layerwise.papers.catalogue import normal, paper_named
from layerwise.papers.ledger import STATUSES, baselines, entries, entry_named, opened_as, status_named
from layerwise.papers.markdown import render_ledger
from layerwise.papers.registered import command_of, read_declaration, registered
from layerwise.recipe import parse_recipe
from layerwise.technique import find, technique_files

ROOT = Path(__file__).resolve().parents[2]


def nothing(technique: str) -> tuple[()]:
    return ()


def test_the_committed_ledger_is_the_computed_one() -> None:
    committed = (ROOT / "docs" / "ledger.md").read_text(encoding="utf-8")
    assert committed == render_ledger(), "stale: run layerwise papers --ledger docs/ledger.md --force"


def test_a_declaration_is_read_as_it_registers() -> None:
    assert {technique.name for technique in registered()} == set(technique_files())
    for technique in registered():
        kind = find(technique.name)
        assert (technique.paper, technique.family, technique.role) == (kind.paper, kind.family, kind.role)


def test_a_declaration_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text('NAME = "A"\n@technique(paper=NAME)\nclass Odd(Encoder): ...\n', encoding="utf-8")
    with pytest.raises(RuntimeError, match="odd"):
        read_declaration("odd", tmp_path / "odd.py")


def test_every_paper_has_one_entry_and_a_status() -> None:
    found = entries()
    assert len(found) == 187 and {entry.status for entry in found} <= set(STATUSES)
    assert not {normal(e.name) for e in baselines()} & {normal(e.name) for e in found}
    listed = [t.name for entry in (*found, *baselines()) for t in entry.techniques]
    assert sorted(listed) == sorted(technique_files())


def test_working_takes_a_technique_and_an_evidence_row() -> None:
    before = {e.name: e for e in entries(nothing)}["AWQ"]
    assert before.status == "not started" and before.reason == "registered as awq, no evidence row yet"
    after = {e.name: e for e in entries(of_awq)}["AWQ"]
    assert after.status == "working" and not after.reason and len(after.rows) == 1
    assert sum(e.status == "working" for e in entries(of_awq)) == 1
    assert not any(e.status == "working" for e in entries(nothing))


def test_a_subject_is_an_application_whose_network_is_opened() -> None:
    for entry in entries(nothing):
        if entry.status == "subject":
            assert entry.paper and entry.paper.family.application and not entry.paper.acts_on_network
            assert entry.command and entry.reason.startswith("opened as a ")
    kinds = {
        name: opened_as(paper)
        for name in ("Llasa", "DefSent+", "MAVIS", "DAG-Rider", "AWQ")
        if (paper := paper_named(name))
    }
    assert kinds == {
        "Llasa": "causal language model", "DefSent+": "bare encoder", "MAVIS": None, "DAG-Rider": None, "AWQ": None
    }  # fmt: skip


def test_commands_are_such_as_the_command_line_takes() -> None:
    verbs: Any = typer.main.get_command(app)
    for command in {command_of(t) for t in registered()} | {e.command for e in entries(nothing)}:
        if command is None:
            continue
        _, verb, *arguments = command.split()
        verbs.commands[verb].make_context(verb, arguments)
        if "--uniform" in arguments:
            parse_recipe(arguments[-1])


@pytest.mark.parametrize(
    ("name", "expected"), [("awq", "AWQ"), ("gptq", "GPTQ"), ("two_sided", "TWO-SIDED"), ("hqq", "HQQ")]
)
def test_papers_baselines_and_techniques_are_shown_by_name(name: str, expected: str) -> None:
    found = entry_named(name, nothing)
    assert found is not None and found.name == expected and found.techniques


def test_words_that_name_nothing_are_no_entry() -> None:
    assert entry_named("layer normalization", nothing) is None


def test_statuses_by_name() -> None:
    assert [status_named(s) for s in ("working", "Subject", "not-started")] == list(STATUSES)
    with pytest.raises(InputError, match="did you mean working"):
        status_named("worked")
    with pytest.raises(InputError, match="a status is one of not started, subject, working"):
        status_named("x")


def test_the_ledger_cannot_be_broken_by_its_texts() -> None:
    page = render_ledger(entries(of_awq), baselines(nothing))
    rows = [line for line in page.splitlines() if line.startswith("| **")]
    assert len(rows) == 187 + len(baselines(nothing))
    assert all(line.replace("\\|", "").count("|") == 7 for line in rows)
    assert "stories \\<5m>" in page and "<5m" not in page.replace("\\<", "")
