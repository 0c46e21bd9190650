"""``layerwise compare MODEL --budget B --techniques A,B``: methods side by side at equal bytes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from layerwise.cli import shared

if TYPE_CHECKING:
    from layerwise.jobs.side_by_side import Comparison


def compare(
    model: shared.Model,
    budget: Annotated[str, typer.Option(help="Size that every plan must fit: 4.5bpw, 12MB, 1234567B or 25%.")],
    techniques: Annotated[
        str,
        typer.Option(
            metavar="A,B+C",
            help="Techniques to hold against each other: rtn,gptq,awq+rtn. "
            "Without it those of trellis, two_sided, gptq, hqq and rtn that reach the budget.",
        ),
    ] = "",
    allocators: Annotated[
        str,
        typer.Option(metavar="A,B", help="Hold these against each other instead, over all techniques: pareto,hawq."),
    ] = "",
    calibrate: shared.Calibrate = "default",
    evaluate: shared.Evaluate = None,
    sequences: shared.Sequences = 128,
    length: shared.Length = 256,
    text_column: shared.TextColumn = None,
    pooling: shared.Pooling = None,
    seeds: Annotated[
        str, typer.Option(metavar="A,B", help="Calibration seeds; of several the mean and half the range are shown.")
    ] = "0",
    threads: shared.Threads = None,
    workers: shared.Workers = None,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "cpu",
    work: shared.Work = None,
    json: shared.Json = False,
) -> None:
    """Plan MODEL with each technique, and with all together, into the same bytes; measure every plan."""
    from layerwise.acts.prepare import Options
    from layerwise.jobs.bench import read_seeds
    from layerwise.jobs.side_by_side import side_by_side

    several = read_seeds(seeds)
    cores = os.cpu_count() or 1
    options = Options(
        model=model, budget=budget, techniques=shared.split_techniques(techniques), calibrate=calibrate,
        allocators=shared.split_techniques(allocators), evaluate=evaluate, sequences=sequences, length=length,
        text_column=text_column, pooling=pooling, seed=several[0],
        threads=cores if threads is None else threads, workers=cores if workers is None else workers, dtype=dtype,
        device=device, work=work,
    )  # fmt: skip
    found = side_by_side(options, shared.Bar(quiet=json), shared.given_command(), several)
    if json:
        shared.print_json(found.as_json())
        return
    show(found)


def show(found: Comparison) -> None:
    from layerwise.report.figures import megabytes, short_metric, significant

    names, several = list(found.dense), len(found.seeds) > 1
    last = "best at" if several else "encoding, s"
    rows = [
        (
            method.technique,
            f"{method.bytes:,}",
            f"{method.bpw:.3f}",
            significant(method.predicted),
            *(
                significant(method.metrics[n], 4) + (f" ± {significant(method.spread[n], 2)}" if several else "")
                for n in names
            ),
            f"{method.best_at} of {len(found.seeds)}" if several else f"{method.seconds:.1f}",
            ", ".join(f"{name} {count}" for name, count in method.sites.items()),
        )
        for method in found.methods
    ]
    dense = ("dense", "", "", "", *(significant(found.dense[name], 4) for name in names), "", "")
    shared.print_table(
        f"{found.network} in {megabytes(found.budget)} ({found.asked}), measured on {found.data}"
        + (f", seeds {' '.join(map(str, found.seeds))}" if several else ""),
        ("technique", "bytes", "bpw", "predicted", *map(short_metric, names), last, "sites"),
        [dense, *rows],
        numeric=tuple(range(1, 5 + len(names))),
    )
    for technique, reason in found.left_out.items():
        print(f"left out: {technique}: {reason}")
