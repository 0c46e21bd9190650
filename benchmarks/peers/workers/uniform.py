"""Our own uniform setting under the same conditions as a peer: one process, the same tokens, tables left alone."""

from __future__ import annotations

import tempfile
from pathlib import Path

from protocol import Job, Made, Result, run

from layerwise.acts.candidates import find_candidates
from layerwise.acts.prepare import Options, prepare
from layerwise.calibrate.inputs import input_parts
from layerwise.calibrate.passes import forward, reverse_uniform
from layerwise.compress import begin
from layerwise.engine.progress import Stopwatch
from layerwise.plan.menu import Menu, fitted
from layerwise.recipe import parse_recipe
from layerwise.technique import GRADIENT_MOMENT


def quantize(job: Job) -> Result:
    recipe = parse_recipe(f"{job.more['technique']}:bits={job.bits},group={job.group}")
    given = {name: job.more[name] for name in ("calibrate", "evaluate", "sequences", "length", "seed")}
    prepared = prepare(
        Options(model=job.network, threads=job.threads, workers=job.threads, techniques=(str(recipe),), **given)
    )
    plain = f"dense:dtype={str(prepared.network.plain_dtype).removeprefix('torch.')}"
    menu = Menu((str(recipe),), (str(parse_recipe(plain)),))
    watch = Stopwatch()
    parts = reverse_uniform if GRADIENT_MOMENT in recipe.needs else input_parts
    with tempfile.TemporaryDirectory(prefix="layerwise-") as folder:
        fingerprint = prepared.network.checkpoint.fingerprint()
        calibration = begin(prepared, Path(folder) / "work", fingerprint)
        forward(calibration, watch)
        found = find_candidates(calibration, menu, job.threads, watch, "uniform", {}, parts)
        made: dict[str, Made] = {}
        for name, site in found.sites.items():
            if site.site.kind == "linear":
                form = site.fetch(fitted(str(recipe), site.site.columns))
                made[name] = Made(form.decode(), form.nbytes)
        calibration.journal.close()
    return Result(made, {})


if __name__ == "__main__":
    run(quantize)
