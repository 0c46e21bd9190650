"""One entry as a person reads it: what the paper does and claims, its technique, options, evidence, the command."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from layerwise.papers.ledger import Entry
from layerwise.technique import find


@dataclass(frozen=True)
class Option:
    """An option of a technique: its name, default, what it may be, what it is."""

    name: str
    default: str
    allowed: str
    help: str


def options_of(technique: str) -> tuple[Option, ...]:
    """The options that the technique's class declares (the class is imported)."""
    return tuple(
        Option(field.name, _written(field.default), _allowed(field), str(field.metadata.get("help", "")))
        for field in dataclasses.fields(find(technique))  # type: ignore[arg-type]
    )


def described(entry: Entry) -> Iterator[tuple[str, str]]:
    """(label, text) lines of an entry."""
    paper = entry.paper
    yield "", f"{entry.name}: {headline(entry)}" if paper else f"{entry.name} (not among the 187 papers)"
    if paper:
        yield "family", paper.family.label + (f", {paper.date}" if paper.date else "")
        yield "does", paper.core
        yield "claims", f"{paper.claim} (the paper's own claim)" if paper.claim else "no figure in the catalogue"
    yield "status", entry.status + (f": {entry.reason}" if entry.reason else "")
    for technique in entry.techniques:
        yield "technique", f"{technique.name} ({technique.family}, {technique.role}): {technique.summary}"
        for option in options_of(technique.name):
            yield "option", f"{option.name}={option.default}  {_join(option.allowed, option.help)}"
    for row in entry.rows:
        yield "evidence", row.sentence()
    if entry.command:
        yield "command", entry.command
    for again in dict.fromkeys(row.command for row in entry.rows):
        if again != entry.command:
            yield "again", again


def headline(entry: Entry) -> str:
    """The paper's title without the name it begins with; empty for a baseline."""
    if entry.paper is None:
        return ""
    title = entry.paper.title
    rest = title.removeprefix(entry.name).lstrip()
    return rest[1:].strip() if rest != title and rest.startswith(":") else title


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _allowed(field: dataclasses.Field[object]) -> str:
    limits = field.metadata
    low, high, choices = limits.get("minimum"), limits.get("maximum"), limits.get("choices")
    if choices is not None:
        return " or ".join(_written(choice) for choice in choices)
    if low is None and high is None:
        return ""
    return f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} to {high}"


def _join(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
