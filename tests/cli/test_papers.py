"""``layerwise papers``: lists, finds, shows, writes, and refuses in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.command import layerwise
from tests.test_light_start import HEAVY, loaded_after

from layerwise.papers.meaning import VARIABLE


@pytest.fixture(autouse=True)
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_json_lists_every_paper() -> None:
    done = layerwise("papers", "--json")
    assert done.code == 0 and not done.err
    assert len(done.json) == 187
    assert set(done.json[0]) == {
        "name", "title", "family", "year", "date", "does", "claims", "status", "reason", "techniques", "evidence",
        "command",
    }  # fmt: skip


def test_a_search_prints_the_best_first_and_one_quiet_line() -> None:
    done = layerwise("papers", "ternary", "weights", "--limit", "3")
    assert done.code == 0 and "Ternary_Binary_Transformer" in done.out
    assert len(done.sentences) == 1 and "full text alone" in done.err
    assert layerwise("papers", "ternary", "generation", "--json").json[0]["name"] == "Ternary_Binary_Transformer"


def test_a_name_shows_the_paper() -> None:
    done = layerwise("papers", "awq")
    assert done.code == 0 and not done.err
    for expected in (
        "Activation-aware Weight Quantization",
        "the paper's own claim",
        "technique awq",
        "steps=20",
        "--uniform awq+rtn",
    ):
        assert expected in done.out
    assert layerwise("papers", "awq", "--json").json["techniques"] == ["awq"]


def test_a_baseline_is_shown_too() -> None:
    done = layerwise("papers", "GPTQ")
    assert done.code == 0 and "not among the 187" in done.out and "damp=0.01" in done.out


def test_the_page_and_the_ledger_are_written_once(tmp_path: Path) -> None:
    page, ledger = tmp_path / "papers.html", tmp_path / "ledger.md"
    done = layerwise("papers", "--page", page, "--ledger", ledger)
    assert done.code == 0 and page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert ledger.read_text(encoding="utf-8").startswith("# Ledger")
    again = layerwise("papers", "--page", page)
    assert again.code == 2 and "--force" in again.err
    assert layerwise("papers", "--page", page, "--force").code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ledger.md", "papers.html"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--family", "quantise"), "did you mean quantize"),
        (("--status", "done"), "a status is one of"),
        (("--year", "soon"), "must be a year"),
        (("--limit", "0"), "--limit must be at least 1"),
        (("--limit", "many"), "--limit"),
        (("words", "--network", "nowhere"), "--network must name a folder"),
        (("words", "--page", "x.html"), "leave out the words"),
        (("--page", "no/such/folder/x.html"), "cannot be written"),
        (("--page", "."), "exists"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = layerwise("papers", *arguments)
    assert done.code == 2 and not done.out and said in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_search_loads_no_numeric_library() -> None:
    code = "from layerwise.papers.ask import ask\nassert len(ask().entries) == 187\nassert ask('layer norm').entries"
    assert not loaded_after(code) & set(HEAVY)
