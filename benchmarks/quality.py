"""Our plan against uniform settings of the same size: over all bytes, and over linears with the very same tables.

    python benchmarks/quality.py [NETWORK] [--calibrate TEXT] [--evaluate TEXT] [--bits 4 3 2] [--seeds 0 1 2]

Every baseline is ``TECHNIQUE:bits=B,group=64`` on all linears, calibrated on every token, with tables rounded to the
same grid. The plan's budget is the baseline's exact size. "linears only" stores the baseline's tables bit for bit and
spends what they leave on linears. All networks of one seed are measured in one pass over the held-out text.

Exits with 1 when a plan is larger than its baseline. Losing to a baseline is a finding, not a failure.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.runs import Run, add_run_options, opened, run_options, texts
from benchmarks.tables import Table, add_output_options, publish

from layerwise.acts.apply import linear_bytes, predicted_bytes
from layerwise.acts.candidates import find_candidates
from layerwise.acts.kept import fetches, overlay, uniform_plan
from layerwise.acts.prepare import site_bytes
from layerwise.acts.uniform import Baseline, encode_uniform, uniform_choice, unreached_recipes
from layerwise.calibrate.inputs import input_parts
from layerwise.calibrate.passes import reverse_uniform
from layerwise.evaluate.compare import Measured, compare
from layerwise.evaluate.sentences import spearman
from layerwise.network.overlay import Fetch, Overlay
from layerwise.plan.menu import Menu, uniform_recipes
from layerwise.plan.pareto import Pareto
from layerwise.plan.tree import Allocation, Choice, Leaf, Node, Sum
from layerwise.recipe import parse_recipe
from layerwise.technique import GRADIENT_MOMENT

GROUP = 64
LOWER_IS_BETTER = ("kl", "perplexity", "distance")


@dataclass(frozen=True)
class Rival:
    """A plan that is held against a baseline. ``predicted`` is None where a baseline's table has no damage of ours."""

    scope: str
    bytes: int
    predicted: float | None
    variant: str


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_run_options(parser)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], help="widths of the baselines (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="calibration seeds (%(default)s)")
    parser.add_argument("--baselines", nargs="+", default=["rtn", "gptq", "two_sided"], metavar="TECHNIQUE")
    add_output_options(parser)
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    with texts(given) as (calibrate, evaluate):
        for seed in given.seeds:
            with opened(given, run_options(given, calibrate, evaluate, seed)) as run:
                rows += rows_of_seed(run, seed, given.bits, given.baselines)
    summary = summarize(rows)
    name = rows[0]["network"]
    publish(
        given,
        [
            Table.of(f"{name}: plan against baseline of the same size", rows, [k for k in rows[0] if k != "network"]),
            Table.of(f"{name}: mean ± half the range over calibration seeds {given.seeds}", summary),
        ],
        {"benchmark": "quality", "rows": rows, "summary": summary},
    )
    return int(any(row["bytes"] > row["baseline bytes"] for row in rows))


def rows_of_seed(run: Run, seed: int, bits: Sequence[int], techniques: Sequence[str]) -> list[dict[str, Any]]:
    """Encode the baselines, plan at their sizes, measure everything in one pass."""
    variants: dict[str, Overlay] = {}
    pairs: list[tuple[int, str, Baseline, Rival]] = []
    plans: dict[int, Rival] = {}  # by budget: baselines of one grid have one size
    uniform = {technique: encode_widths(run, technique, bits) for technique in techniques}
    for width in bits:
        for technique in techniques:
            baseline = uniform[technique][width]
            variants[baseline.recipe] = baseline.weights
            if baseline.bytes not in plans:
                plans[baseline.bytes] = plan_all(run, baseline, variants)
            for rival in (plans[baseline.bytes], plan_linears(run, baseline, variants)):
                pairs.append((width, technique, baseline, rival))
    network, prepared = run.prepared.network, run.prepared
    with run.watch.stage("evaluate", (1 + len(variants)) * len(network.tree.blocks)) as advance:
        found = compare(
            network, variants, prepared.loss, prepared.evaluation.batches, run.calibration.folder,
            prepared.options.device, advance,
        )  # fmt: skip
    scores = {name: with_spearman(run, measured, seed) for name, measured in found.items()}
    return [
        row
        for width, technique, baseline, rival in pairs
        for row in compared(network.name, seed, width, technique, baseline, rival, scores, prepared.loss.name)
    ]


def encode_widths(run: Run, technique: str, bits: Sequence[int]) -> dict[int, Baseline]:
    """What ``encode_uniform`` makes of each width, in one pass over the network instead of one a width."""
    static = ",refits=0" if technique == "two_sided" else ""  # the baseline has static grids; refits are ours
    recipes = {width: parse_recipe(f"{technique}:bits={width},group={GROUP}{static}") for width in bits}
    linears = {width: uniform_recipes(recipe, "same")[0] for width, recipe in recipes.items()}
    tables = {width: str(parse_recipe(uniform_recipes(recipe, "same")[1])) for width, recipe in recipes.items()}
    needs_gradients = any(GRADIENT_MOMENT in recipe.needs for recipe in recipes.values())
    found = find_candidates(
        run.calibration,
        Menu(tuple(linears.values()), tuple(tables.values())),
        run.prepared.options.workers,
        run.watch,
        f"baselines {technique} {' '.join(map(str, bits))}",
        unreached_recipes(run.candidates),
        reverse_uniform if needs_gradients else input_parts,
    )
    network, out = run.prepared.network, {}
    for width, recipe in recipes.items():
        chosen = uniform_plan(found, linears[width], tables[width])
        if all(name in [c.recipe for c in found.sites[site].candidates] for site, name in chosen.items()):
            size = predicted_bytes(network, chosen)
            out[width] = Baseline(str(recipe), size, linear_bytes(network, chosen), overlay(found, chosen))
        else:  # at some site a narrower width was the better one, so that this one was not kept
            args = run.prepared, run.calibration, run.candidates, str(recipe), "same", run.watch
            out[width] = encode_uniform(*args)
    return out


def plan_all(run: Run, baseline: Baseline, variants: dict[str, Overlay]) -> Rival:
    """The best plan that is no larger than the baseline."""
    network = run.prepared.network
    allocation = Pareto().allocate(run.candidates.tree(), baseline.bytes - run.prepared.range.fixed)
    recipes = recipes_of(allocation)
    name = f"plan {baseline.bytes}"
    variants[name] = overlay(run.refitted(recipes), recipes)
    return Rival("all bytes", predicted_bytes(network, recipes), allocation.damage, name)


def plan_linears(run: Run, baseline: Baseline, variants: dict[str, Overlay]) -> Rival:
    """The best linears beside the baseline's own tables and heads, as it stores them, in the baseline's size."""
    network = run.prepared.network
    uniform = uniform_choice(network, run.candidates, baseline.recipe, "same")
    linears = {s.name for s in network.tree.sites if s.kind == "linear"}
    tables = {name: fetch for name, fetch in baseline.weights.encoded.items() if name not in linears}
    taken = sum(site_bytes(network.tree.find(name), uniform[name], network) for name in tables)
    tree = only(run.candidates.tree(), linears)
    allocation = Pareto().allocate(tree, baseline.bytes - run.prepared.range.fixed - taken)
    recipes = recipes_of(allocation)
    size = predicted_bytes(network, {**{name: uniform[name] for name in tables}, **recipes})
    name = f"linears {baseline.bytes} {digest_of(tables)}"
    stored = {**tables, **fetches(run.refitted(recipes), recipes)}
    variants[name] = Overlay(network, stored, run.candidates.plain(recipes))
    return Rival("linears only", size, None, name)


def recipes_of(allocation: Allocation) -> dict[str, str]:
    return {name: candidate.recipe for name, candidate in allocation.sites.items()}


def only(node: Node, names: set[str]) -> Node:
    """The tree without the sites that are not named."""
    if isinstance(node, Sum):
        kept = [child for child in node.children if not isinstance(child, Leaf) or child.name in names]
        return Sum(node.name, tuple(only(child, names) for child in kept))
    if isinstance(node, Choice):
        return Choice(node.name, tuple((label, only(option, names)) for label, option in node.options))
    return node


def digest_of(stored: Mapping[str, Fetch]) -> str:
    """Hash of what the sites store: two baselines with equal tables share their plan of linears."""
    digest = hashlib.sha256()
    for name in sorted(stored):
        for suffix, tensor in sorted(stored[name]().tensors().items()):
            digest.update(f"{name}{suffix}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def with_spearman(run: Run, measured: Measured, seed: int) -> dict[str, float]:
    """The metrics, with the rank correlation where the held-out text is scored pairs."""
    evaluation, scores = run.prepared.evaluation, dict(measured.metrics)
    if evaluation.index is not None and measured.vectors is not None:
        scores["spearman"] = spearman(measured.vectors, evaluation.index, evaluation.text.pairs, seed)[0]
    return scores


def compared(
    network: str,
    seed: int,
    width: int,
    technique: str,
    baseline: Baseline,
    rival: Rival,
    scores: Mapping[str, Mapping[str, float]],
    loss: str,
) -> list[dict[str, Any]]:
    """One row a metric. Predicted damage stands beside the loss that it predicts."""
    ours, theirs = scores[rival.variant], scores[baseline.recipe]
    rows = []
    for metric in ours:
        if metric == "agreement":
            continue
        predicted = rival.predicted if metric == loss else None
        rows.append(
            {
                "network": network,
                "seed": seed,
                "bits": width,
                "baseline": technique,
                "scope": rival.scope,
                "metric": metric,
                "baseline bytes": baseline.bytes,
                "bytes": rival.bytes,
                "dense": scores["dense"][metric],
                "of baseline": theirs[metric],
                "of plan": ours[metric],
                "ratio": ours[metric] / theirs[metric],
                "predicted": predicted,
                "predicted/measured": predicted / ours[metric] if predicted is not None else None,
            }
        )
    return rows


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and half the range over seeds, and whether the plan is better at every one."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in ("bits", "baseline", "scope", "metric")), []).append(row)
    out = []
    for (width, technique, scope, metric), found in groups.items():
        better = [r["ratio"] < 1 if metric in LOWER_IS_BETTER else r["ratio"] > 1 for r in found]
        predictions = [r["predicted/measured"] for r in found if r["predicted/measured"] is not None]
        out.append(
            {
                "bits": width,
                "baseline": technique,
                "scope": scope,
                "metric": metric,
                "of baseline": spread([r["of baseline"] for r in found]),
                "of plan": spread([r["of plan"] for r in found]),
                "ratio": spread([r["ratio"] for r in found]),
                "predicted/measured": spread(predictions) if predictions else None,
                "wins": f"{sum(better)} of {len(better)}",
                "wins at every seed": all(better),
            }
        )
    return out


def spread(values: Sequence[float]) -> str:
    """Mean ± half the range."""
    if len(values) == 1:
        return f"{values[0]:.4g}"
    return f"{statistics.fmean(values):.4g} ± {(max(values) - min(values)) / 2:.2g}"


if __name__ == "__main__":
    sys.exit(main())
