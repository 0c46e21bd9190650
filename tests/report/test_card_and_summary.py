"""The model card and the terminal's table."""

from __future__ import annotations

import io
import re

import pytest
from tests.report.example_evidence import bare_evidence, decoder_evidence, encoder_evidence, hostile_evidence

from layerwise.errors import InputError
from layerwise.report.card import render_card
from layerwise.report.summary import summary_notes, summary_rows, summary_table


def test_card_of_an_encoder() -> None:
    card = render_card(encoder_evidence())
    front = card.split("---\n")[1]
    assert "library_name: layerwise" in front and "pipeline_tag: sentence-similarity" in front
    assert 'base_model: "sentence-transformers/all-MiniLM-L6-v2"' in front
    for wanted in ("layerwise.load(", "AutoModel.from_pretrained(", "SentenceTransformer(", "layerwise export",
                   "| Embedding distance", "**0.0102**", "rtn:bits=4,group=64", "## Limits", "same source",
                   "layerwise compress", "pooler.dense"):  # fmt: skip
        assert wanted in card, wanted


def test_card_of_a_decoder_loads_its_own_class() -> None:
    card = render_card(decoder_evidence())
    assert "AutoModelForCausalLM" in card and "SentenceTransformer" not in card
    assert "pipeline_tag: text-generation" in card and "No speed was measured" in card


def test_card_leaves_out_a_base_model_that_is_a_directory() -> None:
    for name in ("./models/mine", "/data/mine", "mine", "a/b/c", "../mine"):
        evidence = encoder_evidence()
        evidence["network"]["name"] = name
        assert "base_model" not in render_card(evidence)


def test_card_says_when_the_baseline_is_better() -> None:
    evidence = encoder_evidence()
    assert "better" not in render_card(evidence).split("## Limits")[1]
    evidence["rows"][1]["quality"]["stsb_spearman"]["value"] = 70.0
    assert "The uniform baseline has the better STS-B Spearman." in render_card(evidence)


def test_card_of_little_evidence() -> None:
    card = render_card(bare_evidence())
    assert "not evaluated on held-out data" in card and "No uniform baseline" in card and "None" not in card


def test_card_of_a_uniform_run_does_not_claim_a_search() -> None:
    evidence = encoder_evidence()
    evidence["rows"][1]["recipe"] = "gptq:bits=3,group=64"
    assert "encoded every linear with `gptq:bits=3,group=64`" in render_card(evidence)


def test_hostile_names_stay_text_in_the_card() -> None:
    card = render_card(hostile_evidence())
    outside = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", card)  # fenced blocks
    outside = re.sub(r"(?s)(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)", "", outside)  # code spans
    assert "<script" not in outside and "<img" not in outside
    header = next(line for line in card.splitlines() if line.startswith("| | dense"))
    for line in card.splitlines():
        if line.startswith("| ") and "sites" not in line and line.count(" | ") > 2:
            assert len(re.findall(r"(?<!\\)\|", line)) == header.count("|")


def test_card_refuses_what_is_not_evidence() -> None:
    with pytest.raises(InputError):
        render_card({})


def test_summary_rows_and_notes() -> None:
    rows = summary_rows(encoder_evidence())
    assert rows[0] == ["", "dense", "plan", "baseline"]
    assert [row[0] for row in rows[1:3]] == ["Size", "Bits per weight"]
    assert all(len(row) == 4 for row in rows)
    assert ["Embedding distance", "0", "0.0102", "0.0431"] in rows
    notes = dict(summary_notes(encoder_evidence()))
    assert (
        notes["time"] == "82 s" and notes["peak memory"] == "612 MB" and notes["re-plan"].startswith("layerwise plan")
    )
    assert [label for label, _ in summary_notes(bare_evidence())] == ["low coverage", "time"]


@pytest.mark.parametrize("make", [encoder_evidence, decoder_evidence, hostile_evidence, bare_evidence])
def test_the_table_prints_without_steering_the_terminal(make) -> None:
    from rich.console import Console

    evidence = make()
    evidence["replan"] = "[red]not markup[/red]\x1b[2J"
    out = io.StringIO()
    Console(file=out, width=100, force_terminal=False).print(summary_table(evidence))
    assert "\x1b" not in out.getvalue() and "[red]not markup[/red]" in out.getvalue()
