"""``layerwise calibrate MODEL --work DIR``: measure every layer, keep the result for any number of plans."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from layerwise.cli import shared


def calibrate(
    model: shared.Model,
    work: Annotated[str, typer.Option(metavar="DIR", help="Work folder to fill.")],
    techniques: shared.Techniques = None,
    calibrate: shared.Calibrate = "default",
    evaluate: shared.Evaluate = None,
    sequences: shared.Sequences = 128,
    length: shared.Length = 256,
    text_column: shared.TextColumn = None,
    pooling: shared.Pooling = None,
    seed: shared.Seed = 0,
    threads: shared.Threads = None,
    workers: shared.Workers = None,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "cpu",
    rewrite: shared.Rewrite = None,
    json: shared.Json = False,
) -> None:
    """Measure every layer of MODEL and encode its candidates into a work folder."""
    from layerwise.acts.prepare import Options
    from layerwise.compress import measure_candidates, start
    from layerwise.engine.progress import Stopwatch
    from layerwise.plan.candidates import recipe_bpw
    from layerwise.report.figures import significant

    cores = os.cpu_count() or 1
    options = Options(
        model=model, work=work, techniques=shared.split_techniques(techniques), calibrate=calibrate, evaluate=evaluate,
        sequences=sequences, length=length, text_column=text_column, pooling=pooling, seed=seed,
        threads=cores if threads is None else threads, workers=cores if workers is None else workers, dtype=dtype,
        device=device, rewrite=rewrite,
    )  # fmt: skip
    prepared, calibration, _ = start(options, watch := Stopwatch(shared.Bar(quiet=json)))
    try:
        found = measure_candidates(prepared, calibration, watch)
    finally:
        calibration.journal.close()
    if json:
        rows = [
            {"site": name, "tokens": site.tokens, "recipe": c.recipe, "bytes": c.bytes, "damage": c.damage,
             "bpw": recipe_bpw(c.recipe, site.site.rows, site.site.columns)}
            for name, site in found.sites.items() for c in site.candidates
        ]  # fmt: skip
        shared.print_json({"loss": prepared.loss.name, "unit": prepared.loss.unit, "candidates": rows})
        return
    shared.print_table(
        f"Candidates kept; damage in {prepared.loss.unit}",
        ("site", "recipe", "bytes", "bpw", "damage", "tokens"),
        [
            (
                name,
                c.recipe,
                f"{c.bytes:,}",
                f"{recipe_bpw(c.recipe, site.site.rows, site.site.columns):.2f}",
                significant(c.damage),
                f"{site.tokens:,}",
            )
            for name, site in found.sites.items()
            for c in site.candidates
        ],
        numeric=(2, 3, 4, 5),
    )
