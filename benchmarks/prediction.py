"""Predicted damage against the measured rise of the loss: one site at a time, and for whole networks.

    python benchmarks/prediction.py [NETWORK] [--bits 2 3 4] [--encoders rtn two_sided] [--pairs 0] [--on steer]

Every linear is stored at each width by each encoder, fitted on the fit split and judged on the judge split, and then
measured alone, all else dense, on tokens that neither has seen. Whole plans are as large as a uniform setting of the
width and are measured on the held-out text. Exits with 1 when a figure misses its limit and ``--check`` is given.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.runs import Run, add_run_options, opened, run_options, texts
from benchmarks.tables import Table, add_output_options, publish

from layerwise.acts.apply import predicted_bytes
from layerwise.acts.candidates import find_candidates
from layerwise.acts.kept import Candidates, overlay, uniform_plan
from layerwise.acts.uniform import unreached_recipes
from layerwise.calibrate.splits import first_tokens
from layerwise.evaluate.compare import compare
from layerwise.evaluate.sites import measure_sites
from layerwise.network.overlay import Overlay
from layerwise.plan.menu import Menu, fitted, uniform_recipes
from layerwise.plan.pareto import Pareto
from layerwise.recipe import parse_recipe

GROUP = 64
SPEARMAN, SPEARMAN_IN_WIDTH, MEDIAN_WITHIN, PLAN_WITHIN = 0.9, 0.75, 1.5, 0.2  # the limits of --check


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_run_options(parser)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], help="widths of single sites (%(default)s)")
    parser.add_argument("--encoders", nargs="+", default=["rtn", "two_sided"], metavar="TECHNIQUE")
    parser.add_argument("--pairs", type=int, default=0, help="(site, recipe) pairs drawn at random; 0 = all of them")
    parser.add_argument(
        "--on", choices=("steer", "held-out"), default="steer", help="what single sites are measured on"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="tokens that single sites are measured on")
    parser.add_argument("--plan-bits", type=int, nargs="*", default=[4, 3], help="widths whose size whole plans have")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a limit is missed")
    add_output_options(parser)
    given = parser.parse_args(arguments)
    with (
        texts(given) as (calibrate, evaluate),
        opened(given, run_options(given, calibrate, evaluate, given.seed)) as run,
    ):
        stored = {name: stage_of(run, name, given.bits) for name in given.encoders}
        sites = single_sites(run, stored, given)
        networks = whole_networks(run, stored, given)
        name = run.prepared.network.name
    summary = [summary_row("all", sites)]
    for key in ("bits", "encoder", "kind"):
        for value in dict.fromkeys(row[key] for row in sites):
            summary.append(summary_row(f"{key} {value}", [row for row in sites if row[key] == value]))
    tables = [
        Table.of(f"{name}: single sites, predicted damage and measured loss", summary),
        Table.of(f"{name}: whole networks on the held-out text", networks),
    ]
    missed = misses(summary, given.bits, networks)
    values = {"rows": sites, "summary": summary, "networks": networks, "missed": missed}
    publish(given, tables, {"benchmark": "prediction", "network": name, **values})
    print("limits: " + ("; ".join(missed) if missed else "all kept"))
    return int(given.check and bool(missed))


def stage_of(run: Run, encoder: str, bits: Sequence[int]) -> Candidates:
    """One encoder's candidates at every width. Encoders of one grid would shadow each other in one stage."""
    pairs = [uniform_recipes(parse_recipe(f"{encoder}:bits={width},group={GROUP}"), "same") for width in bits]
    linears, tables = (tuple(str(parse_recipe(recipe)) for recipe in column) for column in zip(*pairs, strict=True))
    stage = f"single {encoder} {' '.join(map(str, bits))}"
    only = unreached_recipes(run.candidates)
    return find_candidates(run.calibration, Menu(linears, tables), run.prepared.options.workers, run.watch, stage, only)


def single_sites(run: Run, stored: dict[str, Candidates], given: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a (site, encoder, width): predicted and measured."""
    pairs = [
        (encoder, site.name, width, kept[recipe])
        for encoder, candidates in stored.items()
        for site in run.prepared.network.tree.sites
        for kept in [{c.recipe: c for c in candidates.sites[site.name].candidates}]
        for width in given.bits
        for recipe in [fitted(str(parse_recipe(f"{encoder}:bits={width},group={GROUP}")), site.columns)]
        if site.kind == "linear" and candidates.sites[site.name].reached and recipe in kept
    ]
    if 0 < given.pairs < len(pairs):
        drawn = sorted(random.Random(given.seed).sample(range(len(pairs)), given.pairs))
        pairs = [pairs[i] for i in drawn]
    prepared = run.prepared
    batches = prepared.splits.steer if given.on == "steer" else prepared.evaluation.batches
    changes = [(site, stored[encoder].sites[site].fetch(candidate.recipe)) for encoder, site, _, candidate in pairs]
    with run.watch.stage(f"measure {len(pairs)} single sites", 1) as advance:
        measured = measure_sites(
            prepared.network, changes, prepared.loss, first_tokens(batches, given.tokens), prepared.options.device
        )
        advance()
    return [
        {
            "site": site,
            "kind": site.removeprefix(prepared.network.tree.find(site).block or "").strip("."),
            "encoder": encoder,
            "bits": width,
            "bytes": candidate.bytes,
            "predicted": candidate.damage,
            "measured": value,
        }
        for (encoder, site, width, candidate), value in zip(pairs, measured, strict=True)
    ]


def whole_networks(run: Run, stored: dict[str, Candidates], given: argparse.Namespace) -> list[dict[str, Any]]:
    """Plans and uniform settings: the sum of predicted damages against the loss of the stored network."""
    prepared, network = run.prepared, run.prepared.network
    variants: dict[str, Overlay] = {}
    about: dict[str, dict[str, Any]] = {}
    for encoder, candidates in stored.items():
        for width in given.bits:
            linear, table = uniform_recipes(parse_recipe(f"{encoder}:bits={width},group={GROUP}"), "same")
            recipes = uniform_plan(candidates, str(parse_recipe(linear)), str(parse_recipe(table)))
            damages = {n: {c.recipe: c.damage for c in found.candidates} for n, found in candidates.sites.items()}
            if any(recipe not in damages[name] for name, recipe in recipes.items()):
                continue  # at some site a smaller width does less damage: nothing uniform is kept there
            size = predicted_bytes(network, recipes)
            variants[linear] = overlay(candidates, recipes)
            about[linear] = {"bytes": size, "predicted": sum(damages[n][r] for n, r in recipes.items())}
            name = f"plan as large as {width} bits"
            if width in given.plan_bits and name not in variants:
                allocation = Pareto().allocate(run.candidates.tree(), size - prepared.range.fixed)
                recipes = {site: c.recipe for site, c in allocation.sites.items()}
                variants[name] = overlay(run.refitted(recipes), recipes)
                about[name] = {"bytes": predicted_bytes(network, recipes), "predicted": allocation.damage}
    with run.watch.stage("evaluate", (1 + len(variants)) * len(network.tree.blocks)) as advance:
        found = compare(
            network, variants, prepared.loss, prepared.evaluation.batches, run.calibration.folder,
            prepared.options.device, advance,
        )  # fmt: skip
    rows = []
    for name, known in about.items():
        loss = found[name].metrics[prepared.loss.name]
        rows.append({"network": name, **known, "measured": loss, "predicted/measured": known["predicted"] / loss})
    return sorted(rows, key=lambda row: (not row["network"].startswith("plan"), row["network"]))


def summary_row(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rank correlation, and the median of measured over predicted with its quartiles."""
    from scipy.stats import spearmanr

    ratios = [row["measured"] / row["predicted"] for row in rows if row["predicted"] > 0]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    predicted, measured = [r["predicted"] for r in rows], [r["measured"] for r in rows]
    correlation = spearmanr(predicted, measured).statistic if len(rows) > 2 else None
    return {
        "pairs of": name,
        "count": len(rows),
        "spearman": None if correlation is None else float(correlation),
        "measured/predicted": middle,
        "lower quartile": low,
        "upper quartile": high,
    }


def misses(summary: Sequence[dict[str, Any]], bits: Sequence[int], networks: Sequence[dict[str, Any]]) -> list[str]:
    """What does not keep its limit, in words."""
    found = []
    limits = {"all": SPEARMAN, **{f"bits {width}": SPEARMAN_IN_WIDTH for width in bits}}
    for row in summary:
        limit = limits.get(row["pairs of"])
        if limit is not None and row["spearman"] is not None and row["spearman"] < limit:
            found.append(f"Spearman of {row['pairs of']} is {row['spearman']:.3f}, below {limit}")
    middle = summary[0]["measured/predicted"]
    if not 1 / MEDIAN_WITHIN <= middle <= MEDIAN_WITHIN:
        found.append(f"the median of measured/predicted is {middle:.3g}, not within {MEDIAN_WITHIN} times")
    for row in networks:
        if row["network"].startswith("plan") and abs(row["predicted/measured"] - 1) > PLAN_WITHIN:
            found.append(f"the {row['network']} is predicted at {row['predicted/measured']:.2f} of what is measured")
    return found


if __name__ == "__main__":
    sys.exit(main())
