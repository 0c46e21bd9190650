"""``layerwise export OUT PLACE --to FORMAT``: the result in a form that other tools read."""

from __future__ import annotations

from typing import Annotated

import typer

from layerwise.cli import shared


def export(
    artifact: Annotated[str, typer.Argument(help="A folder written by layerwise compress.", metavar="OUT")],
    place: Annotated[str, typer.Argument(help="Folder to write, or the file where the format is one.", metavar="DIR")],
    to: Annotated[
        str,
        typer.Option(
            help="dense: a plain 16-bit checkpoint. compressed-tensors: packed, for vLLM and transformers. "
            "gguf: a file for llama.cpp. onnx: a folder for ONNX Runtime."
        ),
    ] = "dense",
    target: shared.Target = None,
    reencode: Annotated[
        bool, typer.Option("--reencode", help="Round again the sites that the format cannot hold exactly.")
    ] = False,
    evaluate: Annotated[
        str, typer.Option("--evaluate", metavar="TEXT", help="Text to measure the loss of --reencode on.")
    ] = "default",
    force: shared.Force = False,
) -> None:
    """Write OUT in a form that needs no layerwise to load."""
    from layerwise.jobs.exporting import ExportOptions, export

    for line in export(artifact, place, to, ExportOptions(force, reencode, evaluate, target)):
        print(line)
