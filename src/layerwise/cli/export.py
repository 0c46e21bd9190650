"""``layerwise export OUT DIR``: the result in a form that other tools read."""

from __future__ import annotations

from typing import Annotated

import typer

from layerwise.cli import shared


def export(
    artifact: Annotated[str, typer.Argument(help="A folder written by layerwise compress.", metavar="OUT")],
    folder: Annotated[str, typer.Argument(help="Folder to write.", metavar="DIR")],
    to: Annotated[str, typer.Option(help="dense: a plain 16-bit checkpoint for any tool.")] = "dense",
    force: shared.Force = False,
) -> None:
    """Write OUT as a plain checkpoint that needs no layerwise to load."""
    from layerwise.errors import InputError, nearest
    from layerwise.export.dense import export_dense

    if to != "dense":
        raise InputError(f"there is no export to {to!r}{nearest(to, ['dense'])}")
    export_dense(artifact, folder, force=force)
    print(f"wrote {folder}")
