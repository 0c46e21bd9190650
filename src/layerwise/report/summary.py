"""What the terminal shows at the end of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from layerwise.report.evidence import low_coverage
from layerwise.report.figures import against_baseline, comparison, duration, megabytes, significant, steering_metric

if TYPE_CHECKING:
    from rich.console import Group


def summary_rows(evidence: Mapping[str, Any]) -> list[list[str]]:
    """The comparison as text: a header row (``""``, names of the networks), then a label and one cell per network."""
    names, lines = comparison(evidence)
    rows = [["", *map(_printable, names)]]
    for line in lines:
        interval = [f" ({note})" if note and " to " in note else "" for _, note in line.cells]
        rows.append([_printable(line.label), *(v + i for (v, _), i in zip(line.cells, interval, strict=True))])
    return rows


def summary_notes(evidence: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, text) pairs below the table: recipe of the baseline, prediction, time, memory, the re-plan command."""
    notes = []
    for row in evidence["rows"]:
        if row["name"] == "baseline" and row.get("recipe"):
            notes.append(("baseline", str(row["recipe"])))
    name = steering_metric(evidence)
    if name is not None and (words := against_baseline(evidence, name)) is not None:
        notes.append((name, words[0]))
    predicted = evidence.get("predicted")
    if predicted:
        measured = predicted.get("measured")
        seen = f", measured {significant(measured)}" if measured is not None else ""
        notes.append(("predicted damage", f"{significant(predicted['damage'])}{seen} {evidence['loss']['unit']}"))
    thin = sum(low_coverage(site) is not None for site in evidence["sites"])
    if thin:
        notes.append(("low coverage", f"{thin} {'site' if thin == 1 else 'sites'}, named in the report"))
    seconds = evidence["seconds"]
    notes.append(("time", duration(seconds.get("total", sum(seconds.values())))))
    if evidence.get("peak_memory"):
        notes.append(("peak memory", megabytes(evidence["peak_memory"])))
    if evidence.get("replan"):
        notes.append(("re-plan", evidence["replan"]))
    return [(label, _printable(text)) for label, text in notes]


def summary_table(evidence: Mapping[str, Any]) -> Group:
    """The same as a rich renderable: a table and its notes."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    header, *rows = summary_rows(evidence)
    _, lines = comparison(evidence)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(Text(name, style="bold"), justify="right" if i else "left", no_wrap=bool(i))
    for line, (label, *cells) in zip(lines, rows, strict=True):
        styled = [Text(cell, style="bold green" if i == line.best else "") for i, cell in enumerate(cells)]
        table.add_row(Text(label), *styled)
    notes = Table.grid(padding=(0, 2))
    notes.add_column(style="dim", no_wrap=True)
    notes.add_column(overflow="fold")
    for label, text in summary_notes(evidence):
        notes.add_row(Text(label), Text(text))
    return Group(table, notes)


def _printable(text: str) -> str:
    """Without control characters: a name from a checkpoint must not steer the terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "�", text)
