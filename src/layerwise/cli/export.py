"""``layerwise export OUT DIR``: the result in a form that other tools read."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from layerwise.cli import shared

if TYPE_CHECKING:
    from layerwise.exporting import Written


def export(
    artifact: Annotated[str, typer.Argument(help="A folder written by layerwise compress.", metavar="OUT")],
    folder: Annotated[str, typer.Argument(help="Folder to write.", metavar="DIR")],
    to: Annotated[
        str, typer.Option(help="dense: a plain 16-bit checkpoint for any tool; compressed-tensors: vLLM, transformers.")
    ] = "dense",
    target: shared.Target = None,
    reencode: Annotated[
        bool, typer.Option("--reencode", help="Round what the engine cannot take to its nearest grid, and measure it.")
    ] = False,
    text: Annotated[
        str, typer.Option("--evaluate", metavar="TEXT", help="Text that the loss of --reencode is measured on.")
    ] = "default",
    force: shared.Force = False,
) -> None:
    """Write OUT as a checkpoint that needs no layerwise to load."""
    from layerwise.exporting import export as run

    found = run(artifact, folder, to, target=target, reencode=reencode, text=text, force=force)
    if found.rounded:
        warn(found)
    print(f"wrote {folder}" + (f" (for {found.target})" if found.target else ""))


def warn(found: Written) -> None:
    """What was rounded and what it cost, on standard error."""
    from layerwise.report.figures import significant

    kinds: dict[str, list[str]] = {}
    for site, change in found.rounded.items():
        kinds.setdefault(f"{change.before} -> {change.after}", []).append(site)
    print(f"warning: {len(found.rounded)} sites were rounded for {found.target}:", file=sys.stderr)
    for kind, sites in kinds.items():
        print(f"  {kind}: {sites[0]}" + (f" and {len(sites) - 1} more" if len(sites) > 1 else ""), file=sys.stderr)
    if found.before is not None and found.after is not None:
        parts = [
            f"{name} {significant(value, 4)}" + ("" if value == found.before.get(name) else
            f" (was {significant(found.before.get(name), 4)})") for name, value in found.after.items()
        ]  # fmt: skip
        print(f"  measured against the artifact: {', '.join(parts)}", file=sys.stderr)
