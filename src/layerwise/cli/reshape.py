"""``layerwise reshape MODEL OUT --surgeon NAME``: the same network with other blocks, heads or channels."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from layerwise.cli import shared


def reshape(
    model: shared.Model,
    out: Annotated[str, typer.Argument(help="Folder to write: a plain checkpoint.", metavar="OUT")],
    surgeon: Annotated[
        str, typer.Option("--surgeon", metavar="NAME", help="What changes its shape: drop_block:count=2.")
    ],
    calibrate: shared.Calibrate = "default",
    evaluate: shared.Evaluate = None,
    sequences: shared.Sequences = 128,
    length: shared.Length = 256,
    text_column: shared.TextColumn = None,
    pooling: shared.Pooling = None,
    seed: shared.Seed = 0,
    threads: shared.Threads = None,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "cpu",
    work: shared.Work = None,
    force: shared.Force = False,
    json: shared.Json = False,
) -> None:
    """Give MODEL another shape, write it as a plain 16-bit checkpoint, and measure it on held-out text."""
    import os

    from layerwise.acts.prepare import Options
    from layerwise.jobs.reshape import reshape as run
    from layerwise.report.figures import megabytes, significant

    options = Options(
        model=model, out=out, calibrate=calibrate, evaluate=evaluate, sequences=sequences, length=length,
        text_column=text_column, pooling=pooling, seed=seed,
        threads=(os.cpu_count() or 1) if threads is None else threads, dtype=dtype, device=device, work=work,
        force=force,
    )  # fmt: skip
    found = run(options, surgeon, shared.Bar(quiet=json), shared.given_command())
    if json:
        shared.print_json({**asdict(found), "out": str(found.out)})
        return
    before, after = found.rows
    rows = [
        ("blocks", *(str(count) for count in found.blocks)),
        ("parameters", *(f"{count:,}" for count in found.parameters)),
        ("size", megabytes(before["bytes"]), megabytes(after["bytes"])),
        *(
            (name, significant(before["quality"][name]["value"], 4), significant(value["value"], 4))
            for name, value in after["quality"].items()
        ),
        ("latency, one sequence", *(f"{ms:.1f} ms" for ms in found.latency_ms)),
    ]
    shared.print_table(f"{found.network}, {found.surgeon}, on {found.data}", ("", "before", "after"), rows, (1, 2))
    print(f"wrote {found.out}")
