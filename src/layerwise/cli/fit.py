"""``layerwise fit METHOD MODEL OUT``: what a method of generation has to learn about a network first."""

from __future__ import annotations

from typing import Annotated

import typer

from layerwise.cli import shared


def fit(
    method: Annotated[
        str, typer.Argument(help="What is to be used: eagle or act; options follow a colon.", metavar="METHOD")
    ],
    network: Annotated[str, typer.Argument(help="A checkpoint of a causal language model.", metavar="MODEL")],
    out: Annotated[str, typer.Argument(help="Folder to write.", metavar="OUT")],
    text: Annotated[
        str, typer.Option("--text", metavar="TEXT", help="Text to learn from: .txt, .jsonl, .csv or a data set id.")
    ],
    seed: shared.Seed = 0,
    threads: shared.Threads = None,
    force: shared.Force = False,
    json: shared.Json = False,
) -> None:
    """Learn from TEXT what METHOD needs to know about MODEL, for layerwise generate --method."""
    from dataclasses import asdict

    from layerwise.jobs.fitting import Fitting
    from layerwise.jobs.fitting import fit as run

    found = run(Fitting(method, network, out, text, seed, threads, force), shared.Bar(quiet=json))
    if json:
        shared.print_json(asdict(found))
        return
    print(f"learned from {found.tokens:,} tokens in {found.seconds:.0f} s; wrote {out} ({found.bytes:,} bytes)")
    print(f"use it with: layerwise generate {network} --method {found.method} --prompt TEXT")
