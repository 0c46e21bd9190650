"""``layerwise import FILE OUT``: what another tool stored packed, as an artifact."""

from __future__ import annotations

from typing import Annotated

import typer

from layerwise.cli import shared


def import_(
    file: Annotated[str, typer.Argument(help="A GGUF file of a LLaMA.", metavar="FILE")],
    out: Annotated[str, typer.Argument(help="Folder to write.", metavar="OUT")],
    force: shared.Force = False,
) -> None:
    """Keep the encodings of a GGUF FILE bit for bit, as an artifact like any other."""
    from layerwise.jobs.importing import import_gguf

    size = import_gguf(file, out, force)
    print(f"wrote {out}: {size:,} bytes")
