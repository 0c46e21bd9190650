"""``layerwise papers``: the map of the field, searched, filtered, shown, written as a page or as the ledger."""

from __future__ import annotations

import sys
from typing import Annotated, Optional

import typer

from layerwise.cli import shared


def papers(
    words: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="What to look for, or the name of one paper.", metavar="[WORDS]..."),
    ] = None,
    family: Annotated[Optional[str], typer.Option(help="Only this family, such as quantize or prune.")] = None,  # noqa: UP045
    status: Annotated[Optional[str], typer.Option(help="Only working, subject or not-started.")] = None,  # noqa: UP045
    year: Annotated[Optional[str], typer.Option(help="Only this year, these years (2020-2023), or none.")] = None,  # noqa: UP045
    limit: Annotated[Optional[int], typer.Option(help="At most so many rows; 10 for a search.")] = None,  # noqa: UP045
    network: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="DIR", help="Compressed MiniLM that encodes the words, to search by meaning too."),
    ] = None,
    page: Annotated[Optional[str], typer.Option(metavar="FILE", help="Write all papers as one HTML page.")] = None,  # noqa: UP045
    ledger: Annotated[Optional[str], typer.Option(metavar="FILE", help="Write the ledger as Markdown.")] = None,  # noqa: UP045
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    json: shared.Json = False,
) -> None:
    """Search the papers of the field, or show one: what it does, how far it works here, and the command."""
    from layerwise.papers.ask import ask, write
    from layerwise.papers.describe import described

    if page or ledger:
        for target in write(page, ledger, force, searching=bool(words or family or status or year or limit)):
            print(f"wrote {target}")
        return
    answer = ask(" ".join(words or ()), family, status, year, limit, network)
    if answer.note:
        print(answer.note, file=sys.stderr)
    if json:
        rows = [entry.as_json() for entry in answer.entries]
        shared.print_json(rows[0] if answer.one else rows)
    elif answer.one:
        for label, text in described(answer.entries[0]):
            print(f"{label:<10}{text}" if label else text)
    else:
        shared.print_table(
            answer.title,
            ("paper", "year", "family", "status", "what it does"),
            [
                (e.name, str(e.paper.year or ""), e.paper.family.name, e.status, e.paper.core)
                for e in answer.entries
                if e.paper
            ],
        )
