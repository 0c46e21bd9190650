"""``layerwise depth MODEL``: what each block is worth."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from layerwise.cli import shared


def depth(
    model: shared.Model,
    html: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--html", metavar="FILE.html", help="Write a page with the pictures; it loads nothing."),
    ] = None,
    calibrate: shared.Calibrate = "default",
    sequences: shared.Sequences = 128,
    length: shared.Length = 256,
    text_column: shared.TextColumn = None,
    pooling: shared.Pooling = None,
    tokens: Annotated[int, typer.Option("--tokens", min=64, help="Tokens that every change is measured on.")] = 2048,
    seed: shared.Seed = 0,
    threads: shared.Threads = None,
    device: shared.Device = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.html if it exists.")] = False,
    json: shared.Json = False,
) -> None:
    """Measure what each block of MODEL is worth: skipped, swapped with the next, beside the next, run twice."""
    from layerwise.report.probe_page import check_page

    page = check_page(html, force) if html is not None else None
    from layerwise.acts.prepare import Options
    from layerwise.library import measure_depth
    from layerwise.network.network import open_network

    Options(model=model, sequences=sequences, length=length, threads=1 if threads is None else threads)
    found = measure_depth(
        open_network(model), tokens=tokens, progress=shared.Bar(quiet=json), text=calibrate,
        text_column=text_column, sequences=sequences, length=length, pooling=pooling, seed=seed, threads=threads,
        device=device,
    )  # fmt: skip
    shared.show_measurement(found, page, json)
