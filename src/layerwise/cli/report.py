"""``layerwise report OUT``: the page, made again from the evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from layerwise.cli import shared


def report(
    artifact: Annotated[str, typer.Argument(help="A folder written by layerwise compress.", metavar="OUT")],
    page: Annotated[Optional[str], typer.Option("--page", metavar="FILE", help="Write the page here instead.")] = None,  # noqa: UP045
    force: shared.Force = False,
    json: shared.Json = False,
) -> None:
    """Print the measured table of OUT and write its page again."""
    from rich.console import Console

    from layerwise.errors import InputError
    from layerwise.report.evidence import read_evidence
    from layerwise.report.page import render_page
    from layerwise.report.summary import summary_table

    evidence = read_evidence(Path(artifact) / "evidence.json")
    target = Path(page) if page else Path(artifact) / "report.html"
    if page and target.exists() and not force:
        raise InputError(f"{target} exists; choose another name or give --force to replace it")
    beside = target.with_name(target.name + ".part")
    beside.write_text(render_page(evidence), encoding="utf-8")
    beside.replace(target)
    if json:
        shared.print_json(evidence)
        return
    Console().print(summary_table(evidence))
    print(f"wrote {target}")
