"""Bytes against quality of each family of techniques alone, and of all families together under one planner.

    python benchmarks/compress_quality.py [NETWORK] [--bits 8 6 5 4 3 2.5 2] [--seeds 0] [--picture FILE.svg]

NETWORK is a checkpoint folder, of a language model or an encoder, or ``resnet20``, ``mlp`` or ``vit``, which
``benchmarks/vision.py`` opens with their images.

    quantize    the default menu: what ``layerwise compress`` chooses among
    prune       every technique of ``prune/`` with its own menu; masks and indices are bytes like all others
    factorize   every technique of ``factorize/`` with its own menu
    depth       blocks taken out, everything else as the default menu has it
    dense       blocks taken out, everything else in 16 bits
    together    all of them: every candidate of every family, and the removal of blocks

All share one search a seed: candidates are encoded once, and each row is planned over those that are its own, within
the same budgets of the whole file. What a plan takes is encoded again, in full, and measured on held-out text. Where
all families together are not better than the best one alone, two tables show why: which family the planner gave each
kind of matrix to, and, layer by layer, the least damage of each family over that of rounding in the same bytes.

Exits with 1 when a plan is larger than its budget. That joining families buys nothing is a finding, not a failure.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fronts import Point, front_of, loss_at, picture, size_at
from benchmarks.networks import add_image_options, data_of
from benchmarks.quantize_search import ALL, Plan, Search, searched
from benchmarks.runs import add_run_options, run_options
from benchmarks.tables import Table, add_output_options, publish

from layerwise.plan.constraints import is_dense
from layerwise.plan.tree import Candidate
from layerwise.recipe import canonical, parse_recipe, surgery
from layerwise.roles import Encoder
from layerwise.technique import find, names

DROP = "drop_block"
TOGETHER = "all families together"
QUANTIZE = "quantize"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_run_options(parser)
    parser.add_argument("--bits", type=float, nargs="+", default=[8, 6, 5, 4, 3.5, 3, 2.5, 2], help="(%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="calibration seeds (%(default)s)")
    parser.add_argument("--families", nargs="+", default=["prune", "factorize"], help="beside quantize (%(default)s)")
    parser.add_argument("--without", nargs="+", default=[], metavar="TECHNIQUE", help="leave these out")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TECHNIQUE", help="instead of all of the families: these, or recipes"
    )
    parser.add_argument("--no-removals", action="store_true", help="offer no removal of blocks")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="write the fronts here, as SVG")
    add_image_options(parser)
    add_output_options(parser)
    given = parser.parse_args(arguments)
    members = {family: encoders_of(family, given.without, given.only) for family in given.families}
    refused: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    sites: list[dict[str, Any]] = []
    with data_of(given) as (calibrate, evaluate, handed):
        for seed in given.seeds:
            asked = [technique for techniques in members.values() for technique in techniques]
            with searched(given, run_options(given, calibrate, evaluate, seed), asked, refused, handed) as search:
                plans = plans_of(search, members, given)
                sites += sites_of(search, seed, list(members))
                scores = search.measure(plans, seed)
                rows += rows_of(search, seed, plans, scores)
    for technique, reason in refused.items():
        print(f"left out: {technique}: {reason}", file=sys.stderr)
    tables = tables_of(rows, given.bits) + tables_of_sites(sites, list(members))
    found = {"benchmark": "compress_quality", "rows": rows, "sites": sites, "left out": refused}
    publish(given, tables, found)
    if given.picture:
        write_picture(given, rows)
    return int(any(row["bpw"] > row["bits"] for row in rows))


def encoders_of(family: str, without: Sequence[str], only: Sequence[str] = ()) -> list[str]:
    """Every registered encoder of a family, or those of ``only`` that belong to it."""
    if only:
        return [text for text in only if parse_recipe(text).encoder.family == family]
    return [name for name in names(Encoder) if find(name).family == family and name not in without]


def plans_of(search: Search, members: Mapping[str, Sequence[str]], given: argparse.Namespace) -> list[Plan]:
    """Every row's plans at every budget."""
    plans = search.planned("family", QUANTIZE, search.offered(()), ALL, given.bits)
    for family, techniques in members.items():
        mine = [t for t in techniques if t in search.methods]
        if mine:
            plans += search.planned("family", family, search.offered(mine), ALL, given.bits)
    everything = search.everything()
    if not given.no_removals and search.run.prepared.network.tree.blocks:
        label = canonical(DROP)
        for row, techniques in (("depth", ()), ("dense", ("dense",))):
            plans += search.planned("family", row, search.with_removals(label, techniques), ALL, given.bits)
        everything = search.with_removals(label)
    return plans + search.planned("together", TOGETHER, everything, ALL, given.bits)


def rows_of(
    search: Search, seed: int, plans: Sequence[Plan], scores: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    return [
        {
            **search.figures(plan, seed, scores),
            "family": plan.method,
            "chosen": chosen(search, plan) if plan.kind == "together" else {},
        }
        for plan in plans
        if plan.key() in scores
    ]


def chosen(search: Search, plan: Plan) -> dict[str, int]:
    """``kind of matrix: family`` -> how many of the network's are stored so."""
    found = search.run.candidates.sites
    return Counter(
        f"{kind_of(name) if name in search.linears else 'tables'}: {family_of(recipe)}"
        for name, recipe in plan.recipes.items()
        if found[name].reached
    )


def sites_of(search: Search, seed: int, families: Sequence[str]) -> list[dict[str, Any]]:
    """Each linear: what a family's best candidate costs there, over what rounding costs in as many bytes."""
    found = []
    for name, site in search.run.candidates.sites.items():
        if not site.reached or name not in search.linears:
            continue
        by_family: dict[str, list[Candidate]] = {}
        for candidate in site.candidates:
            by_family.setdefault(family_of(candidate.recipe), []).append(candidate)
        rounded = front_of([(c.bytes, c.damage) for c in by_family.get(QUANTIZE, [])])
        row: dict[str, Any] = {"seed": seed, "site": name, "parameters": site.site.parameters}
        for family in families:
            over = [
                (c.damage / at, 8 * c.bytes / site.site.parameters, c.recipe)
                for c in by_family.get(family, [])
                if not is_dense(c.recipe) and (at := loss_at(rounded, c.bytes))
            ]
            row[family] = dict(zip(("ratio", "bpw", "recipe"), min(over), strict=True)) if over else None
        found.append(row)
    return found


def kind_of(site: str) -> str:
    """What a matrix is called in every block: the end of its name."""
    parts = [part for part in site.split(".") if not part.isdigit()]
    return ".".join(parts[-2:])


def family_of(recipe: str) -> str:
    """The family that a site went to."""
    return "depth" if surgery(recipe) else parse_recipe(recipe).encoder.family


# ---------------------------------------------------------------- what is printed


def tables_of(rows: Sequence[Mapping[str, Any]], budgets: Sequence[float]) -> list[Table]:
    name, loss = rows[0]["network"], rows[0]["loss name"]
    seeds = sorted({row["seed"] for row in rows})
    metrics = [m for m in rows[0]["metrics"] if m != "agreement"]
    found = [
        Table.of(f"{name}: {metric} within a budget of bits a weight; seeds {seeds}", by_budget(rows, budgets, metric))
        for metric in metrics
    ]
    found.append(Table.of(f"{name}: {TOGETHER} against the best family alone, by {loss}", contest(rows, budgets)))
    found.append(Table.of(f"{name}: what {TOGETHER} chose, linears of all seeds", choices(rows, budgets)))
    return found


def by_budget(rows: Sequence[Mapping[str, Any]], budgets: Sequence[float], metric: str) -> list[dict[str, Any]]:
    """A row a family, a column a budget; a dash where the family has nothing so small."""
    out = []
    for family in dict.fromkeys(row["family"] for row in rows):
        cells: dict[str, Any] = {"family": family}
        for bits in budgets:
            values = [r["metrics"][metric] for r in rows if r["family"] == family and r["bits"] == bits]
            cells[f"{bits:g}"] = f"{statistics.fmean(values):.4g}" if values else "–"
        out.append(cells)
    return out


def contest(rows: Sequence[Mapping[str, Any]], budgets: Sequence[float]) -> list[dict[str, Any]]:
    """The joint plan of each budget against the best family: ratio of the loss, and bytes it needs for that loss."""
    out = []
    seeds = sorted({row["seed"] for row in rows})
    for bits in budgets:
        ratios, saved, best = [], [], Counter[str]()
        for seed in seeds:
            at = {r["family"]: r for r in rows if r["seed"] == seed and r["bits"] == bits}
            mine = at.pop(TOGETHER, None)
            if mine is None or not at:
                continue
            rival = min(at.values(), key=lambda r: r["loss"])
            best[rival["family"]] += 1
            ratios.append(mine["loss"] / rival["loss"])
            if size := size_at(points(rows, TOGETHER, seed), rival["loss"]):
                saved.append(100 * (1 - size / rival["bytes"]))
        if ratios:
            out.append(
                {
                    "bits": f"{bits:g}",
                    "best family": ", ".join(best),
                    "together / its loss": f"{statistics.fmean(ratios):.4f}",
                    "bytes saved at its loss, %": f"{statistics.fmean(saved):.2f}" if saved else None,
                }
            )
    return out


def choices(rows: Sequence[Mapping[str, Any]], budgets: Sequence[float]) -> list[dict[str, Any]]:
    """Kind of matrix x family -> how many of them, at every budget."""
    joint = [row for row in rows if row["family"] == TOGETHER]
    kinds = sorted({choice for row in joint for choice in row["chosen"]})
    out = []
    for choice in kinds:
        kind, _, family = choice.rpartition(": ")
        counts = {
            f"{bits:g}": sum(row["chosen"].get(choice, 0) for row in joint if row["bits"] == bits) for bits in budgets
        }
        out.append({"matrices": kind, "family": family, **counts})
    return out


def tables_of_sites(sites: Sequence[Mapping[str, Any]], families: Sequence[str]) -> list[Table]:
    """Why: each linear of the first seed, and how many of them each family is better at than rounding."""
    mine = [row for row in sites if row["seed"] == sites[0]["seed"]]
    shown, counts = [], []
    for row in mine:
        cells: dict[str, Any] = {"linear": row["site"]}
        for family in families:
            best = row[family]
            cells[f"{family} / rounding"] = f"{best['ratio']:.3g}" if best else "–"
            cells[f"by {family}"] = f"{best['recipe']} ({best['bpw']:.2f} bits)" if best else "–"
        shown.append(cells)
    for family in families:
        ratios = [row[family]["ratio"] for row in mine if row[family]]
        if ratios:
            counts.append(
                {
                    "family": family,
                    "linears": len(ratios),
                    "better than rounding": sum(r < 1 for r in ratios),
                    "better by 10 %": sum(r < 0.9 for r in ratios),
                    "median": f"{statistics.median(ratios):.3g}",
                    "least": f"{min(ratios):.3g}",
                }
            )
    if not counts:
        return []
    title = "the least predicted damage of a family's candidates over that of rounding in the same bytes"
    return [Table.of(f"why: {title}, over all linears", counts), Table.of(f"the same, layer by layer: {title}", shown)]


def points(rows: Sequence[Mapping[str, Any]], family: str, seed: int | None = None) -> list[Point]:
    return [(r["bytes"], r["loss"]) for r in rows if r["family"] == family and seed in (None, r["seed"])]


def write_picture(given: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> None:
    """Loss over bits a weight, a line a family, of the first seed."""
    first = [row for row in rows if row["seed"] == rows[0]["seed"]]
    curves = {
        family: [(r["bpw"], r["loss"]) for r in first if r["family"] == family]
        for family in dict.fromkeys(r["family"] for r in first)
    }
    title = f"{rows[0]['network']}: {rows[0]['loss name']} over bits a weight"
    panels = [("each family alone, and all together", curves)]
    given.picture.parent.mkdir(parents=True, exist_ok=True)
    given.picture.write_text(picture(title, panels, TOGETHER, "bits a weight"), encoding="utf-8")
    if given.markdown:
        link = os.path.relpath(given.picture, given.markdown.parent)
        with given.markdown.open("a", encoding="utf-8") as page:
            page.write(f"\n![{title}, a line a family]({link})\n")


if __name__ == "__main__":
    sys.exit(main())
