"""The ledger: what the product makes of each paper. A status is computed from the code and never typed.

- *working*: a technique is registered under the paper's name and has evidence rows. (That it obeys the laws of its
  role is the contract battery's business, which runs over every registered technique.)
- *subject*: the paper applies a network rather than changing one, and what the catalogue says of it names a network
  of a kind that the workbench opens: something to compress.
- *not started*: everything else, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from layerwise.errors import InputError, nearest
from layerwise.papers.catalogue import Paper, normal, paper_named, papers
from layerwise.papers.registered import Registered, by_paper, command_of, registered
from layerwise.papers.rows import Row, evidence_rows

Status = Literal["working", "subject", "not started"]
STATUSES: tuple[Status, ...] = get_args(Status)

# Words of the catalogue that name a network which the workbench opens, and what it opens it as.
OPENED = (
    (r"\bsentence embeddings\b", "bare encoder"),
    (r"\bLLMs?\b|\blanguage models?\b|\bLlama\b|\bdecoder from scratch\b", "causal language model"),
)
NOT_OPENED = r"\bmultimodal\b|\bvision-language\b|\bencoder-decoder\b"


@dataclass(frozen=True)
class Entry:
    """A paper, or a baseline that is not among the papers, with what is computed about it."""

    name: str
    paper: Paper | None
    techniques: tuple[Registered, ...]
    rows: tuple[Row, ...]
    status: Status
    reason: str  # of *working*: what of the paper is left out; of *subject*: what it is opened as; else: why
    command: str | None

    def as_json(self) -> dict[str, Any]:
        about = self.paper
        return {
            "name": self.name,
            "title": about.title if about else None,
            "family": about.family.name if about else self.techniques[0].family,
            "year": about.year if about else None,
            "date": about.date if about else None,
            "does": about.core if about else self.techniques[0].summary,
            "claims": about.claim if about else None,
            "status": self.status,
            "reason": self.reason or None,
            "techniques": [technique.name for technique in self.techniques],
            "evidence": [row.as_json() for row in self.rows],
            "command": self.command,
        }


Evidence = Callable[[str], Sequence[Row]]


def entries(evidence: Evidence = evidence_rows) -> tuple[Entry, ...]:
    """One entry for each of the papers, in the order of the catalogue."""
    groups = by_paper()
    return tuple(_entry(p.short, p, groups.get(normal(p.short), ()), evidence) for p in papers())


def baselines(evidence: Evidence = evidence_rows) -> tuple[Entry, ...]:
    """Registered techniques whose paper is not among the 187: what others are compared with, and what is our own."""
    return tuple(
        _entry(group[0].paper, None, group, evidence)
        for group in by_paper().values()
        if paper_named(group[0].paper) is None
    )


def entry_named(name: str, evidence: Evidence = evidence_rows) -> Entry | None:
    """The entry of a paper, a baseline or a technique with exactly this name, however it is spaced or cased."""
    paper = paper_named(name)
    technique = next((t for t in registered() if normal(t.name) == normal(name)), None)
    key = normal(paper.short) if paper else technique.key if technique else normal(name)
    return next((e for e in (*entries(evidence), *baselines(evidence)) if normal(e.name) == key), None)


def status_named(text: str) -> Status:
    """The status of this name. Raises ``InputError`` naming the three."""
    for status in STATUSES:
        if normal(status) == normal(text):
            return status
    close = nearest(text, list(STATUSES))
    raise InputError(f"there is no status {text!r}{close.replace('known are', 'a status is one of')}")


def opened_as(paper: Paper) -> str | None:
    """What the workbench would open an application's network as; None where the catalogue names none that it takes."""
    said = f"{paper.title} {paper.core}"
    if not paper.family.application or paper.acts_on_network or re.search(NOT_OPENED, said):
        return None
    return next((kind for words, kind in OPENED if re.search(words, said)), None)


def _entry(name: str, paper: Paper | None, group: tuple[Registered, ...], evidence: Evidence) -> Entry:
    rows = tuple(row for technique in group for row in evidence(technique.name))
    status, reason = _status(paper, group, rows)
    if status == "subject":
        command: str | None = "layerwise compress MODEL OUT --budget 4bpw"
    else:
        # The technique's own command first; where no verb takes its role, what its evidence was made with.
        own = (command_of(technique) for technique in group)
        command = next((c for c in own if c), rows[0].command if rows else None)
    return Entry(name, paper, group, rows, status, reason, command)


def _status(paper: Paper | None, group: Sequence[Registered], rows: Sequence[Row]) -> tuple[Status, str]:
    if rows:
        left_out = dict.fromkeys(technique.left_out for technique in group if technique.left_out)
        return "working", "; ".join(f"not here: {part}" for part in left_out)
    if group:
        listed = ", ".join(technique.name for technique in group)
        return "not started", f"registered as {listed}, no evidence row yet"
    assert paper is not None  # a baseline is in the ledger because a technique is registered for it
    kind = opened_as(paper)
    if kind:
        return "subject", f"opened as a {kind}"
    if paper.acts_on_network:
        return "not started", ""
    if paper.family.application:
        return "not started", "an application, and no network that the workbench opens is named"
    return "not started", "does not act on a trained network"
