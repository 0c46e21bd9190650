"""``layerwise bench TECHNIQUE``: measure a technique's evidence again; ``layerwise bench kernels``: the products."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from layerwise.cli import shared
from layerwise.cli.bench_kernels import bench_kernels

if TYPE_CHECKING:
    from layerwise.evidence.rows import Evidence


def bench(
    technique: Annotated[
        str,
        typer.Argument(
            help="A technique, or one with options: gptq:bits=3,group=128. Or kernels, for the packed products.",
            metavar="TECHNIQUE",
        ),
    ],
    network: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="DIR", help="Network to measure on; the example in a source checkout by default."),
    ] = None,
    calibrate: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="TEXT", help="Calibration text for --network."),
    ] = None,
    evaluate: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="TEXT", help="Held-out text for --network."),
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="A,B", help="Calibration seeds, separated by commas.")] = "0,1",
    sequences: Annotated[int, typer.Option(help="Calibration sequences.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 128,
    workers: shared.Workers = None,
    write: Annotated[bool, typer.Option("--write", help="Write the rows to the technique's evidence file.")] = False,
    shapes: Annotated[str, typer.Option(metavar="MxN,..", help="Matrices of kernels; 4096x4096,11008x4096.")] = "",
    batches: Annotated[str, typer.Option(metavar="A,B", help="Tokens in a batch of kernels; 1,8,32.")] = "",
    rounds: Annotated[int, typer.Option(help="Rounds of measuring kernels.")] = 5,
    json: shared.Json = False,
) -> None:
    """Measure TECHNIQUE against its baseline at equal bytes, and print its evidence rows; or time the kernels."""
    if technique == "kernels":
        return bench_kernels(shapes, batches, rounds, json)
    from layerwise.evidence.rows import Evidence, evidence_file, read_evidence, write_evidence
    from layerwise.jobs.bench import Bench, check, read_seeds
    from layerwise.jobs.bench import bench as run

    cores = os.cpu_count() or 1
    asked = Bench(
        technique, network, calibrate, evaluate, read_seeds(seeds), sequences, length,
        cores if workers is None else workers,
    )  # fmt: skip
    check(asked)
    found = run(asked, shared.Bar(quiet=json))
    if write:
        before = read_evidence(found.technique) or Evidence(found.technique, found.paper, ())
        write_evidence(before.replacing(found.rows))
    if json:
        print(found.text(), end="")
        return
    show(found)
    if write:
        print(f"wrote {evidence_file(found.technique)}")


def show(found: Evidence) -> None:
    from layerwise.report.figures import significant

    for metric in dict.fromkeys(row.metric for row in found.rows):
        rows = [row for row in found.rows if row.metric == metric]
        shared.print_table(
            f"{found.technique} ({found.paper}) on {rows[0].network}: {metric}, {rows[0].data}, "
            f"seeds {' '.join(map(str, rows[0].seeds))}",
            ("setting", "bytes", metric, "±", "baseline", "bytes", metric, "ratio"),
            [
                (
                    row.setting,
                    f"{row.bytes:,}",
                    significant(row.value, 4),
                    significant(row.spread, 2),
                    row.baseline.recipe,
                    f"{row.baseline.bytes:,}",
                    significant(row.baseline.value, 4),
                    "" if row.ratio is None else f"{row.ratio:.3f}",
                )
                for row in rows
            ],
            numeric=(1, 2, 3, 5, 6, 7),
        )
