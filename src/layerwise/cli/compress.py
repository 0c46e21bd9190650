"""``layerwise compress MODEL OUT``: the whole job."""

from __future__ import annotations

import os
from typing import Annotated, Optional

import typer

from layerwise.cli import shared


def compress(
    model: shared.Model,
    out: Annotated[str, typer.Argument(help="Folder to write.", metavar="OUT")],
    budget: Annotated[Optional[str], typer.Option(help="Size of the result: 4.5bpw, 12MB, 1234567B or 25%.")] = None,  # noqa: UP045
    quality_loss: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Tolerated loss instead of a size: 1% (perplexity), kl:0.01 or distance:0.01."),
    ] = None,
    uniform: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="RECIPE", help="One recipe on every linear instead: gptq:bits=3,group=64."),
    ] = None,
    embeddings: Annotated[str, typer.Option(help="Tables of --uniform: same (grid, rounded) or int8.")] = "same",
    plan: Annotated[Optional[str], typer.Option(metavar="plan.json", help="Apply this (edited) plan.")] = None,  # noqa: UP045
    techniques: shared.Techniques = None,
    calibrate: shared.Calibrate = "default",
    evaluate: shared.Evaluate = None,
    sequences: shared.Sequences = 128,
    length: shared.Length = 256,
    text_column: shared.TextColumn = None,
    pooling: shared.Pooling = None,
    keep: shared.Keep = None,
    fix: shared.Fix = None,
    redo: shared.Redo = None,
    seed: shared.Seed = 0,
    threads: shared.Threads = None,
    workers: shared.Workers = None,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "cpu",
    rewrite: shared.Rewrite = None,
    allocator: shared.Allocator = None,
    target: shared.Target = None,
    activations: shared.Activations = None,
    work: shared.Work = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Encode the chosen recipes again behind the compressed blocks.")
    ] = False,
    tune: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="TUNER", help="Then improve the stored values: signround:steps=200."),
    ] = None,
    no_baseline: Annotated[bool, typer.Option("--no-baseline", help="Do not measure the uniform baseline.")] = False,
    force: shared.Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print size, time, memory and disk, and stop.")] = False,
    json: shared.Json = False,
) -> None:
    """Make MODEL fit a budget, prove it on held-out text, write OUT."""
    from layerwise.acts.forecast import forecast
    from layerwise.acts.prepare import Options
    from layerwise.compress import compress as run

    cores = os.cpu_count() or 1
    options = Options(
        model=model, out=out, budget=budget, quality_loss=quality_loss, uniform=uniform, embeddings=embeddings,
        plan=plan, techniques=shared.split_techniques(techniques), calibrate=calibrate, evaluate=evaluate,
        sequences=sequences, length=length, text_column=text_column, pooling=pooling, keep=tuple(keep or ()),
        fix=tuple(fix or ()), redo=tuple(redo or ()), seed=seed, threads=cores if threads is None else threads,
        workers=cores if workers is None else workers, dtype=dtype, device=device, work=work, sequential=sequential,
        tune=tune, baseline=not no_baseline, force=force, rewrite=rewrite, allocators=(allocator,) if allocator else (),
        target=target,
        activations=activations,
    )  # fmt: skip
    if dry_run:
        found = forecast(options)
        if json:
            shared.print_json(found.as_json())
        else:
            shared.print_table("Before the work", ("", ""), found.rows())
        return
    result = run(options, shared.Bar(quiet=json), shared.given_command())
    if json:
        shared.print_json(result.evidence)
        return
    from rich.console import Console

    from layerwise.report.summary import summary_table

    Console().print(summary_table(result.evidence))
    print(f"wrote {result.out} (open {result.out / 'report.html'})")
