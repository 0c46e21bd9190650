"""The shipped catalogue and the names its papers go by."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerwise.errors import InputError
from layerwise.papers.catalogue import FAMILIES, catalogue_bytes, family_named, normal, paper_named, papers, years_named


def test_the_catalogue_is_the_shared_one(shared: Path) -> None:
    assert catalogue_bytes() == (shared / "catalogue" / "papers.json").read_bytes()


def test_all_papers_are_there_with_names_of_their_own() -> None:
    assert len(papers()) == 187
    assert len({normal(paper.short) for paper in papers()}) == 187
    assert {paper.kind for paper in papers()} == set(FAMILIES)
    assert all(paper.core and paper.title for paper in papers())


def test_every_paper_is_found_by_its_name_and_its_title() -> None:
    for paper in papers():
        assert paper_named(paper.short) is paper
        assert paper_named(paper.title.upper()) is paper


@pytest.mark.parametrize(
    ("name", "short"),
    [("awq", "AWQ"), ("lnfree gpt2", "LN-free GPT-2"), ("voids", "LAC (Voids)"), ("lac", "LAC (Voids)")],
)
def test_a_name_may_be_written_otherwise(name: str, short: str) -> None:
    found = paper_named(name)
    assert found is not None and found.short == short


@pytest.mark.parametrize("name", ["", "layer", "GPTQ", "no such paper"])
def test_other_words_name_no_paper(name: str) -> None:
    assert paper_named(name) is None


def test_a_year_is_read_only_where_the_date_states_one() -> None:
    years = {paper.date: paper.year for paper in papers()}
    assert years["May 20, 2025"] == 2025 and years["Sep 21"] is None and years[None] is None


def test_families_are_found_by_name_label_and_kind() -> None:
    for kind, family in FAMILIES.items():
        assert family_named(kind) == family_named(family.name) == family_named(family.label.upper()) == family
    with pytest.raises(InputError, match="did you mean quantize"):
        family_named("quantise")
    with pytest.raises(InputError, match="families are quantize, prune"):
        family_named("§")


def test_years() -> None:
    assert years_named("2024") == range(2024, 2025)
    assert years_named("2020-2023") == range(2020, 2024)
    assert years_named("none") is None
    for wrong in ("24", "2023-2020", "soon", ""):
        with pytest.raises(InputError, match="must be a year"):
            years_named(wrong)
