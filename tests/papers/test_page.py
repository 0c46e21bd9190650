"""The page: whole, self-contained, escaped."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
from html.parser import HTMLParser

import pytest
from tests.papers.evidence import of_awq

from layerwise.papers.ledger import baselines, entries
from layerwise.papers.page import render_page


class Read(HTMLParser):
    """Elements that are open and closed, attributes by tag, texts."""

    VOID = {"meta", "input", "br", "circle", "path"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def values(self, name: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(name))]


@pytest.fixture(scope="module")
def page() -> str:
    return render_page()


def test_every_paper_is_a_card_with_what_it_does(page: str) -> None:
    read = Read(page)
    assert not read.stack
    cards = [a for tag, a in read.tags if tag == "article"]
    assert len(cards) == 187 + len(baselines())
    ids = read.values("id")
    assert len(ids) == len(set(ids))
    text = " ".join(" ".join(read.texts).split())
    for entry in entries():
        assert entry.paper and entry.paper.core in text and entry.name in text
        assert not entry.paper.claim or entry.paper.claim in text
        assert not entry.command or entry.command in text
    assert {link.removeprefix("#") for link in read.values("href")} <= set(ids)


def test_it_loads_nothing(page: str) -> None:
    read = Read(page)
    assert not read.values("src") and not [tag for tag, _ in read.tags if tag in ("link", "img", "iframe")]
    assert not re.search(r"url\(|@import|https?://|fetch\(|XMLHttp", page)
    script = re.search(r"<script>(.*)</script>", page, re.S)
    assert script is not None and page.count("<script") == 1
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page and "default-src 'none'" in page


def test_evidence_stands_beside_its_baseline() -> None:
    found = next(e for e in entries(of_awq) if e.name == "AWQ")
    page = render_page([found], [])
    for expected in ("Measured here", "0.0035 ± 0.0002", "2.53 MB", "<td>0.007</td>", "s-working", "The paper claims"):
        assert expected in page


def test_everything_is_escaped() -> None:
    attack = "\"><script>alert(1)</script>'&$name"
    one = next(e for e in entries(of_awq) if e.name == "AWQ")
    assert one.paper is not None
    paper = dataclasses.replace(
        one.paper, short=attack, title=attack, core=attack, claim=attack, date=attack, org=attack
    )
    baseline = dataclasses.replace(one.rows[0].baseline, recipe=attack)
    row = dataclasses.replace(one.rows[0], network=attack, metric=attack, setting=attack, baseline=baseline)
    technique = dataclasses.replace(one.techniques[0], name=attack, summary=attack)
    nasty = dataclasses.replace(
        one, name=attack, paper=paper, rows=(row,), techniques=(technique,), command=attack, reason=attack
    )
    page = render_page([nasty], [dataclasses.replace(nasty, paper=None)])
    assert page.count("<script") == 1 and "alert(1)</script>" not in page
    assert not Read(page).stack


def test_same_ledger_same_page(page: str) -> None:
    assert render_page() == page
