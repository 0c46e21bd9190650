"""``layerwise tune STUDENT OUT --teacher MODEL``: train a smaller dense network on what a larger one gives."""

from __future__ import annotations

import os
from typing import Annotated, Optional

import typer

from layerwise.cli import shared


def tune(
    student: Annotated[
        str, typer.Argument(help="A plain checkpoint, such as export --to dense made.", metavar="STUDENT")
    ],
    out: Annotated[str, typer.Argument(help="Folder to write: the student with other values.", metavar="OUT")],
    teacher: Annotated[
        str, typer.Option("--teacher", metavar="MODEL", help="The network that it learns from; the same tokenizer.")
    ],
    calibrate: Annotated[
        str, typer.Option("--calibrate", metavar="TEXT", help="Text to train on: .txt, .jsonl, .csv or a data set id.")
    ],
    technique: Annotated[
        str, typer.Option("--technique", metavar="NAME", help="How it learns, such as hidden:steps=400.")
    ] = "logits",
    evaluate: shared.Evaluate = None,
    sequences: Annotated[int, typer.Option(help="Sequences to train on; steps go through them again and again.")] = 512,
    length: shared.Length = 128,
    text_column: shared.TextColumn = None,
    pooling: shared.Pooling = None,
    seed: shared.Seed = 0,
    threads: shared.Threads = None,
    work: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="DIR", help="Folder of a run under way; OUT.work by default, removed on success."),
    ] = None,
    no_baseline: Annotated[bool, typer.Option("--no-baseline", help="Skip plain logits in as many steps.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print time and memory, and stop.")] = False,
    force: shared.Force = False,
    json: shared.Json = False,
) -> None:
    """Recover the quality of a smaller network by layer-wise distillation from the one it was made of."""
    from layerwise.jobs.distilling import distil, table
    from layerwise.jobs.distilling_prepare import Distillation, forecast_distillation, prepare_distillation

    asked = Distillation(
        student, out, teacher, technique, calibrate, evaluate, sequences, length, text_column, pooling, seed,
        (os.cpu_count() or 1) if threads is None else threads, work, not no_baseline, force,
    )  # fmt: skip
    if dry_run:
        from dataclasses import asdict

        found = forecast_distillation(prepare_distillation(asked))
        if json:
            shared.print_json(asdict(found))
        else:
            shared.print_table("Before the work", ("", ""), found.rows())
        return
    evidence = distil(asked, shared.Bar(quiet=json), shared.given_command())
    if json:
        shared.print_json(evidence)
        return
    columns, rows = table(evidence)
    shared.print_table(
        f"{evidence['student']['name']}, taught by {evidence['teacher']['name']}, on held-out text",
        columns, rows, numeric=range(2, len(columns)),
    )  # fmt: skip
    print(f"wrote {out} ({evidence['bytes']:,} bytes of weights)")
