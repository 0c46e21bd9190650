"""The page: every paper as a card of a feed, in one HTML file that loads nothing.

All that is known stands in the markup, so the page reads without JavaScript; the inline script searches as one types,
filters and orders. Everything from the catalogue and the evidence is escaped where it enters the markup, the script
writes text nodes only, and a content security policy allows this one script by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from string import Template

from layerwise.papers.catalogue import FAMILIES, normal
from layerwise.papers.describe import headline
from layerwise.papers.ledger import STATUSES, Entry, baselines, entries
from layerwise.papers.meaning import neighbours
from layerwise.papers.rows import Row, figure, megabytes

NEAR = 3  # neighbours in meaning that a card links to
LABELS = {family.name: family.label for family in FAMILIES.values()}
EXPLAINED = {
    "working": "a technique is registered and measured",
    "subject": "its network can be compressed here",
    "not started": "nothing runs yet",
}


def render_page(papers: Sequence[Entry] | None = None, others: Sequence[Entry] | None = None) -> str:
    """The page as HTML text, of the whole ledger unless entries are given."""
    near: Sequence[Sequence[int]] = neighbours(NEAR) if papers is None else ()
    papers = entries() if papers is None else papers
    others = baselines() if others is None else others
    script = "\n".join(["(() => {", '"use strict";', _template("feed.js"), "})();"])
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    counts = {status: sum(entry.status == status for entry in papers) for status in STATUSES}
    cards = [_card(e, [papers[i] for i in near[n]] if near else []) for n, e in enumerate(papers)]
    return Template(_template("feed.html")).substitute(
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'",
        style=_template("feed.css") + _tints(),
        script=script,
        count=len(papers),
        summary=", ".join(f"{number} {status}" for status, number in counts.items()),
        meter="".join(f'<i class="s-{_slug(s)}" style="flex:{n}"></i>' for s, n in counts.items() if n),
        key="".join(
            f'<span><i class="s-{_slug(s)}"></i><b>{n} {s}</b> {EXPLAINED[s]}</span>' for s, n in counts.items()
        ),
        statuses="".join(f"<option>{status}</option>" for status in STATUSES),
        years=_years(papers),
        families=_families(papers),
        cards="\n".join(cards),
        baselines=_others(others),
    )


def _card(entry: Entry, near: Sequence[Entry] = ()) -> str:
    paper = entry.paper
    folder = "" if paper else entry.techniques[0].family
    shown = {
        "id": _anchor(entry.name),
        "family": paper.family.name if paper else folder,
        "label": paper.family.label if paper else LABELS.get(folder, folder),
        "status": entry.status,
        "year": str(paper.year or "") if paper else "",
        "time": str(_time(paper.date) if paper else 0),
        "name": entry.name,
        "does": paper.core if paper else entry.techniques[0].summary,
    }
    title = headline(entry)
    parts = {
        "state": _slug(entry.status),
        "title": f'<p class="title">{escape(title)}</p>' if title else "",
        "claim": _claim(entry),
        "here": _here(entry),
        "command": _command(entry.command),
        "foot": _foot(entry, near),
    }
    escaped = {key: escape(value) for key, value in shown.items()}
    return Template(_template("card.html")).substitute(escaped, **parts)


def _claim(entry: Entry) -> str:
    if entry.paper is None or not entry.paper.claim:
        return ""
    return f'<p class="claim"><span class="tag">The paper claims</span> {escape(entry.paper.claim)}</p>'


def _here(entry: Entry) -> str:
    """How far we reproduce it: the evidence, or what there is instead."""
    listed = ", ".join(f"<code>{escape(t.name)}</code>" for t in entry.techniques)
    if entry.rows:
        rows = "".join(map(_row, entry.rows))
        return f'<span class="tag">Measured here, with {listed}</span><table>{rows}</table>'
    return escape(entry.reason[:1].upper() + entry.reason[1:] + ".") if entry.reason else ""


def _row(row: Row) -> str:
    """A measured result above what it is measured against."""
    spread = f" ± {figure(row.spread)}" if len(row.seeds) > 1 else ""
    lines = (
        (row.setting, row.bytes, figure(row.value) + spread),
        (row.baseline.recipe, row.baseline.bytes, figure(row.baseline.value)),
    )
    return f'<tr><th colspan="3">{escape(row.network)}, {escape(row.metric)}</th></tr>' + "".join(
        f"<tr><td>{escape(recipe)}</td><td>{escape(megabytes(size))}</td><td>{escape(value)}</td></tr>"
        for recipe, size, value in lines
    )


def _command(command: str | None) -> str:
    if not command:
        return ""
    copy = '<button type="button" hidden aria-label="Copy the command">copy</button>'
    words = " ".join(f"<span>{escape(word)}</span>" for word in command.split())  # a word is not broken at its dashes
    return f'<div class="run"><code>{words}</code>{copy}</div>'


def _foot(entry: Entry, near: Sequence[Entry]) -> str:
    said = [escape(text) for text in ((entry.paper.date, entry.paper.org) if entry.paper else ()) if text]
    if near:
        links = ", ".join(f'<a href="#{escape(_anchor(e.name))}">{escape(e.name)}</a>' for e in near)
        said.append(f"Near it: {links}")
    return '<p class="foot">' + "".join(f"<span>{part}</span>" for part in said) + "</p>" if said else ""


def _others(others: Sequence[Entry]) -> str:
    if not others:
        return ""
    return (
        '<section class="others"><h2>Baselines and our own</h2><p>Techniques whose paper is not among those above: '
        "what others are compared with, and what is ours.</p>"
        f'<div class="feed">{"".join(map(_card, others))}</div></section>'
    )


def _families(papers: Sequence[Entry]) -> str:
    counts: Mapping[str, int] = {
        family.name: sum(e.paper is not None and e.paper.family == family for e in papers)
        for family in FAMILIES.values()
    }
    every = f'<button type="button" data-family="" aria-pressed="true">All<span>{len(papers)}</span></button>'
    return every + "".join(
        f'<button type="button" class="f-{family.name}" data-family="{family.name}" aria-pressed="false">'
        f"{escape(family.label)}<span>{counts[family.name]}</span></button>"
        for family in FAMILIES.values()
        if counts[family.name]
    )


def _years(papers: Sequence[Entry]) -> str:
    years = sorted({e.paper.year for e in papers if e.paper and e.paper.year}, reverse=True)
    return "".join(f"<option>{year}</option>" for year in years)


def _tints() -> str:
    """A hue for each family, evenly around the circle."""
    step = 360 / len(FAMILIES)
    return "".join(
        f".f-{family.name} {{ --tint: hsl({round(190 + i * step * 5) % 360} var(--sat) var(--light)); }}\n"
        for i, family in enumerate(FAMILIES.values())
    )


def _time(date: str | None) -> int:
    """A date as a sortable number; 0 where it states no year."""
    try:
        return int(datetime.strptime(date or "", "%b %d, %Y").strftime("%Y%m%d"))
    except ValueError:
        return 0


def _anchor(name: str) -> str:
    return "p-" + normal(name)


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text)


def _template(name: str) -> str:
    return (files("layerwise.papers") / "templates" / name).read_text(encoding="utf-8")
