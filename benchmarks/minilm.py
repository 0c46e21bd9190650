"""all-MiniLM-L6-v2 at three sizes: distance and STS-B of the plan, of uniform rounding at least as large, and dense.

    python benchmarks/minilm.py [NETWORK] [--budgets 4.5bpw 3bpw 2.5bpw] [--exclude sts-test.csv] [--json FILE]

The first budget is a whole ``layerwise compress`` with its GPTQ baseline, timed from start to end after one small run
has filled the cache of compiled code; the others re-plan from the same work folder. Distances are over all sentences
of the held-out file, Spearman over its scored pairs with a bootstrap interval.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.runs import Run, add_run_options, default_texts, opened, run_options, texts
from benchmarks.tables import ROOT, Table, add_output_options, publish

from layerwise.acts.apply import predicted_bytes
from layerwise.acts.kept import overlay
from layerwise.acts.uniform import GROUPS, WIDTHS, encode_uniform, uniform_choice
from layerwise.compress import compress as run_compress
from layerwise.evaluate.compare import Measured, compare
from layerwise.evaluate.sentences import spearman
from layerwise.network.artifact import weights_bytes
from layerwise.network.overlay import Overlay
from layerwise.plan.budget import parse_budget
from layerwise.plan.pareto import Pareto
from layerwise.recipe import parse_recipe

NETWORK = os.path.relpath(ROOT / "build" / "demo" / "minilm")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_run_options(parser, NETWORK)
    parser.add_argument("--budgets", nargs="+", default=["4.5bpw", "3bpw", "2.5bpw"], help="(%(default)s)")
    parser.add_argument("--baseline", default="rtn", help="technique of the uniform baseline (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--untimed", action="store_true", help="leave out the whole run that is only timed")
    add_output_options(parser)
    given = parser.parse_args(arguments)
    if given.exclude is None:
        given.exclude = given.evaluate or default_texts(given.network)[1]
    with texts(given) as (calibrate, evaluate):
        timed = None if given.untimed else end_to_end(given, calibrate, evaluate)
        with opened(given, run_options(given, calibrate, evaluate, given.seed)) as run:
            rows = rows_of_budgets(run, given)
            name = run.prepared.network.name
    publish(
        given,
        [Table.of(f"{name}: plan and uniform {given.baseline}", rows)],
        {"benchmark": "minilm", "rows": rows, "run": timed},
    )
    if timed:
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in timed["stages"].items())
        print(f"{given.budgets[0]} end to end: {timed['seconds']:.1f} s ({stages})")
        print(f"file: {timed['bytes']:,} bytes, predicted {timed['predicted bytes']:,}")
    return 0


def end_to_end(given: argparse.Namespace, calibrate: str, evaluate: str) -> dict[str, Any]:
    """A whole run at the first budget, with an empty work folder and compiled code that is cached."""
    with tempfile.TemporaryDirectory(prefix="layerwise-minilm-") as folder:
        out = Path(folder) / "out"
        compile_loops()
        began = time.perf_counter()
        result = run_compress(
            run_options(given, calibrate, evaluate, given.seed, budget=given.budgets[0], out=str(out))
        )
        seconds = time.perf_counter() - began
        found = {
            "seconds": round(seconds, 2),
            "stages": result.evidence["seconds"],
            "bytes": weights_bytes(out),
            "predicted bytes": result.applied.plan.predicted.bytes,
        }
        shutil.rmtree(out)
    return found


def compile_loops() -> None:
    """Load the compiled loops from their cache, or fill it, by encoding one small matrix with the default encoder."""
    import torch

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.plan.menu import DEFAULT_TECHNIQUES

    weight = torch.linspace(-1, 1, 64 * 64).view(64, 64)
    for technique in (*DEFAULT_TECHNIQUES, "gptq", "rtn"):
        parse_recipe(f"{technique}:bits=4,group=64").encoder.encode(weight, SiteStatistics.uninformed(64, 64))


def rows_of_budgets(run: Run, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Dense, and for every budget the plan and the smallest uniform setting that is at least as large."""
    prepared, network = run.prepared, run.prepared.network
    variants: dict[str, Overlay] = {}
    about: list[dict[str, Any]] = []
    rivals: dict[str, str] = {}  # plan -> uniform setting
    dense = network.checkpoint.safetensors_bytes
    for text in given.budgets:
        began = time.perf_counter()
        budget = parse_budget(text).bytes(network.tree.parameters, dense)
        allocation = Pareto().allocate(run.candidates.tree(), budget - prepared.range.fixed)
        recipes = {name: c.recipe for name, c in allocation.sites.items()}
        size = predicted_bytes(network, recipes)
        seconds = time.perf_counter() - began
        variants[f"plan {text}"] = overlay(run.refitted(recipes), recipes)
        planned = {"bytes": size, "predicted": allocation.damage, "seconds to plan": round(seconds, 2)}
        about.append({"network": f"plan {text}", **planned})
        recipe = smallest_at_least(run, given.baseline, size)
        rivals[f"plan {text}"] = recipe
        if recipe not in variants:
            found = encode_uniform(prepared, run.calibration, run.candidates, recipe, "same", run.watch)
            variants[recipe] = found.weights
            about.append({"network": recipe, "bytes": found.bytes, "predicted": None, "seconds to plan": None})
    with run.watch.stage("evaluate", (1 + len(variants)) * len(network.tree.blocks)) as advance:
        measured = compare(
            network, variants, prepared.loss, prepared.evaluation.batches, run.calibration.folder,
            prepared.options.device, advance,
        )  # fmt: skip
    about.insert(0, {"network": "dense", "bytes": dense, "predicted": None, "seconds to plan": None})
    rows = [
        {**row, "bpw": 8 * row["bytes"] / network.tree.parameters, **scores(run, measured[row["network"]], given.seed)}
        for row in about
    ]
    loss = {row["network"]: row[prepared.loss.name] for row in rows}
    for row in rows:
        rival = rivals.get(row["network"])
        row["against"] = rival
        row["share of its loss"] = loss[row["network"]] / loss[rival] if rival else None
    return rows


def smallest_at_least(run: Run, technique: str, size: int) -> str:
    """The uniform setting nearest above a size; the largest there is when none is that large."""
    network = run.prepared.network
    sizes = {}
    for bits in WIDTHS:
        for group in GROUPS:
            recipe = str(parse_recipe(f"{technique}:bits={bits},group={group}"))
            sizes[recipe] = predicted_bytes(network, uniform_choice(network, run.candidates, recipe, "same"))
    larger = {recipe: found for recipe, found in sizes.items() if found >= size}
    return min(larger, key=lambda r: larger[r]) if larger else max(sizes, key=lambda r: sizes[r])


def scores(run: Run, measured: Measured, seed: int) -> dict[str, Any]:
    """The loss, and Spearman in points with its interval where the held-out text is scored pairs."""
    found: dict[str, Any] = dict(measured.metrics)
    evaluation = run.prepared.evaluation
    if evaluation.index is not None and measured.vectors is not None:
        value, low, high = spearman(measured.vectors, evaluation.index, evaluation.text.pairs, seed)
        found["spearman x 100"] = 100 * value
        found["95 %"] = f"{100 * low:.2f} to {100 * high:.2f}"
    return found


if __name__ == "__main__":
    sys.exit(main())
