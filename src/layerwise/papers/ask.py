"""What the verb asks for, as one call: a paper by its name, or a list by words and filters; and the files it writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from layerwise.errors import InputError
from layerwise.papers.catalogue import family_named, years_named
from layerwise.papers.ledger import Entry, entries, entry_named, status_named
from layerwise.papers.meaning import by_meaning, installed_network
from layerwise.papers.search import Filters, listed, ranked

SHOWN = 10  # rows of a search
TEXT_ONLY = "searched by full text alone: to search by meaning too, run make demo or give --network DIR"


@dataclass(frozen=True)
class Answer:
    """What was found. ``one``: the words name this paper. ``note``: what the user should know about the search."""

    entries: tuple[Entry, ...]
    title: str
    one: bool = False
    note: str = ""


def ask(
    words: str = "",
    family: str | None = None,
    status: str | None = None,
    year: str | None = None,
    limit: int | None = None,
    network: str | None = None,
) -> Answer:
    """Entries for ``layerwise papers``. Raises ``InputError`` for a filter that means nothing."""
    if limit is not None and limit < 1:
        raise InputError(f"--limit must be at least 1, not {limit}")
    years = years_named(year) if year is not None else None
    filters = Filters(
        family_named(family) if family is not None else None,
        status_named(status) if status is not None else None,
        years,
        undated=year is not None and years is None,
    )
    unfiltered = filters == Filters() and limit is None
    if words.strip() and unfiltered and (named := entry_named(words)) is not None:
        return Answer((named,), named.name, one=True)
    everything = entries()
    if not words.strip():
        found = listed(everything, filters, None, limit)
        return Answer(tuple(found), f"{len(found)} of {len(everything)} papers")
    order, note = _order(words, network)
    found = listed(everything, filters, order, SHOWN if limit is None else limit)
    if not found and not note:
        note = f"no paper matches {words!r}"
    return Answer(tuple(found), f"{words.strip()}: {len(found)} papers, best first", note=note)


def _order(words: str, network: str | None) -> tuple[list[int], str]:
    """(ranking, remark); a network that was only found, not named, may fail without failing the search."""
    place = installed_network(network)
    if place is None:
        return ranked(words, None), TEXT_ONLY
    try:
        return ranked(words, by_meaning(words, place)), ""
    except InputError as mistake:
        if network:
            raise
        return ranked(words, None), f"searched by full text alone: {mistake}"


def write(page: str | None, ledger: str | None, force: bool = False, searching: bool = False) -> Iterator[Path]:
    """Write the page and the ledger, each by one rename; yields what was written."""
    from layerwise.papers.markdown import render_ledger
    from layerwise.papers.page import render_page

    if searching:
        raise InputError("--page and --ledger write all papers; leave out the words and the filters")
    wanted = [(Path(name), render) for name, render in ((page, render_page), (ledger, render_ledger)) if name]
    for target, _ in wanted:
        if target.exists() and not force:
            raise InputError(f"{target} exists; choose another name or give --force to replace it")
        if target.is_dir() or not target.parent.is_dir():
            raise InputError(f"{target} cannot be written: it must be a file in a folder that exists")
    for target, render in wanted:
        beside = target.with_name(target.name + ".part")
        beside.write_text(render(), encoding="utf-8")
        beside.replace(target)
        yield target
