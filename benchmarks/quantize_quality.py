"""Bytes against quality of every quantization method, every published allocator and our plan, on one network.

    python benchmarks/quantize_quality.py [NETWORK] [--bits 4 3.5 3 2.5 2] [--seeds 0 1 2] [--picture FILE.svg]

Rows of three kinds share one search a seed:

    planned    one method's own candidates, 16 bits included, planned within the budget by our planner
    uniform    one setting of the method on every linear, at the size that it has
    allocator  a published rule that plans over the candidates of TWO-SIDED

and ours is the planner over the default menu, with dense statistics and (``--sequential``) encoded again behind the
stored prefix. *All techniques* is the planner over every candidate of every method: where it is better than ours,
something is missing in the default menu. Two scopes: *all bytes* counts the whole file, tables planned or on the
uniform setting's grid; *linears only* counts linears beside the same 8-bit tables for all. Methods that rewrite a
network as a whole (hadamard, fold_norms) need a search of their own and have evidence rows instead.

How many bytes ours saves at equal quality is read off both fronts, between points on a straight line of log loss.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fronts import Point, loss_at, picture, size_at
from benchmarks.quantize_search import ALL, EVERYTHING, LINEARS, OURS, Plan, Search, searched
from benchmarks.runs import add_run_options, run_options, texts
from benchmarks.tables import Table, add_output_options, publish

from layerwise.acts.rewriting import encoder_of
from layerwise.cli.shared import split_techniques
from layerwise.recipe import parse_allocator

METHODS = (
    "two_sided", "gptq", "rtn", "hqq", "aptq", "rsq", "awq+rtn", "repquant+rtn", "equalize+rtn", "nf4", "fp4",
    "fireq", "nupes", "adadim", "adaquant", "gwq", "high_impact", "slim_llm", "ptqtp", "ptq161", "ternary", "bivit",
)  # fmt: skip
ALLOCATORS = ("hawq", "inter_layer", "aptq_trace", "layerwise_quant", "high_impact_ratio", "adaquant_ip")
LEVEL_FIELD = "two_sided"  # whose candidates the allocators get
RIVAL = "gptq"
SCOPES = {"all": ALL, "linears": LINEARS}
BETWEEN = (8, 6, 5, 4.5, 1.75)  # more budgets of ours alone, so that its front spans that of uniform settings
SEQUENTIAL = f"{OURS}, --sequential"
MEASURED = f"{OURS}, measured rises"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_run_options(parser)
    parser.add_argument("--bits", type=float, nargs="+", default=[4, 3.5, 3, 2.5, 2], help="budgets (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="calibration seeds (%(default)s)")
    parser.add_argument("--methods", default=",".join(METHODS), help="what is measured alone (%(default)s)")
    parser.add_argument("--allocators", default=",".join(ALLOCATORS), help="(%(default)s)")
    parser.add_argument("--also", action="append", default=[], metavar="A,B", help="plan over these together as well")
    parser.add_argument("--scopes", nargs="+", choices=sorted(SCOPES), default=sorted(SCOPES), help="(%(default)s)")
    parser.add_argument("--uniform", metavar="A,B", help="methods whose uniform settings are measured; all by default")
    parser.add_argument("--sequential", action="store_true", help="encode ours behind the stored prefix too")
    parser.add_argument(
        "--measured-rises", action="store_true", help="plan ours by the measured loss of each single change too"
    )
    parser.add_argument("--picture", metavar="FILE", type=Path, help="write the curves here, as SVG")
    add_output_options(parser)
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    methods = list(split_techniques(given.methods))
    together = [split_techniques(text) for text in given.also]
    asked = list(dict.fromkeys([*methods, LEVEL_FIELD, *(t for group in together for t in group)]))
    with texts(given) as (calibrate, evaluate):
        for seed in given.seeds:
            with searched(given, run_options(given, calibrate, evaluate, seed), asked, refused) as search:
                plans = plans_of(search, given, methods, together)
                scores = search.measure(plans, seed)
                rows += rows_of(search, seed, plans, scores)
    found = tables_of(rows, given.bits)
    for method, reason in refused.items():
        print(f"left out: {method}: {reason}", file=sys.stderr)
    publish(given, found, {"benchmark": "quantize_quality", "rows": rows, "left out": refused})
    if given.picture:
        given.picture.parent.mkdir(parents=True, exist_ok=True)
        given.picture.write_text(drawn(rows), encoding="utf-8")
        if given.markdown:
            link = os.path.relpath(given.picture, given.markdown.parent)
            with given.markdown.open("a", encoding="utf-8") as page:
                page.write(f"\n![{rows[0]['network']}: loss over bits a weight, a line a method]({link})\n")
    return int(any(row["bits"] is not None and row["bpw"] > row["bits"] for row in rows))


def plans_of(
    search: Search, given: argparse.Namespace, methods: Sequence[str], together: Sequence[Sequence[str]]
) -> list[Plan]:
    """Every plan of one seed, of both scopes."""
    plans: list[Plan] = []
    for scope in (SCOPES[s] for s in given.scopes):
        ours = search.planned("ours", OURS, search.offered(()), scope, given.bits)
        plans += ours
        if given.sequential:
            plans += [_behind_the_prefix(p) for p in ours]
        plans += search.planned("ours", OURS, search.offered(()), scope, [b for b in BETWEEN if b not in given.bits])
        if given.measured_rises:
            rule = parse_allocator("adaquant_ip")
            plans += search.planned("ours", MEASURED, search.offered(()), scope, given.bits, rule)
        plans += search.planned("ours", EVERYTHING, search.run.candidates, scope, given.bits)
        for group in together:
            plans += search.planned("ours", " ".join(group), search.offered(group), scope, given.bits)
        for method in (m for m in methods if m in search.methods):
            plans += search.planned("planned", method, search.offered((method,)), scope, given.bits)
            if given.uniform is None or method in split_techniques(given.uniform):
                plans += search.uniform(method, scope)
        for allocator in split_techniques(given.allocators):
            plans += search.allocated(allocator, LEVEL_FIELD, scope, given.bits)
    return plans


def _behind_the_prefix(plan: Plan) -> Plan:
    return replace(plan, method=SEQUENTIAL, sequential=True)


def rows_of(
    search: Search, seed: int, plans: Sequence[Plan], scores: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    return [
        {
            **search.figures(plan, seed, scores),
            "kind": plan.kind,
            "method": plan.setting or plan.method,
            "of": plan.method,
            "scope": plan.scope,
            "dense": dict(scores["measured/dense"]),
            "encoders": dict(Counter(encoder_of(plan.recipes[n]).partition(":")[0] for n in sorted(search.linears))),
        }
        for plan in plans
        if plan.key() in scores
    ]


# ---------------------------------------------------------------- what is printed


def tables_of(rows: Sequence[Mapping[str, Any]], budgets: Sequence[float]) -> list[Table]:
    name, loss = rows[0]["network"], rows[0]["loss name"]
    seeds = sorted({row["seed"] for row in rows})
    found = []
    for scope in dict.fromkeys(row["scope"] for row in rows):
        mine = [row for row in rows if row["scope"] == scope]
        metrics = [m for m in rows[0]["metrics"] if m != "agreement"]
        for metric in metrics:
            title = f"{name}, {scope}: {metric} within a budget of bits a weight; seeds {seeds}, mean ± half the range"
            found.append(Table.of(title, by_budget(mine, budgets, metric)))
        found.append(Table.of(f"{name}, {scope}: ours against the best other row", contest(mine, budgets)))
        if any(row["kind"] == "uniform" for row in mine):
            title = f"{name}, {scope}: uniform settings, and the bytes ours needs for the same {loss}"
            found.append(Table.of(title, savings(mine)))
    return found


def by_budget(rows: Sequence[Mapping[str, Any]], budgets: Sequence[float], metric: str) -> list[dict[str, Any]]:
    """A row a method, a column a budget, the least mean of each column in bold."""
    planned = [row for row in rows if row["bits"] in budgets]
    values: dict[tuple[str, str], dict[float, list[float]]] = {}
    for row in planned:
        values.setdefault((row["kind"], row["method"]), {}).setdefault(row["bits"], []).append(row["metrics"][metric])
    sign = -1 if metric in ("spearman", "top1") else 1
    best = {
        bits: min((sign * statistics.fmean(v[bits]) for v in values.values() if bits in v), default=None)
        for bits in budgets
    }
    out = []
    for (kind, method), found in values.items():
        row: dict[str, Any] = {"kind": kind, "method": method}
        for bits in budgets:
            cell = _spread(found[bits]) if bits in found else "–"
            if bits in found and sign * statistics.fmean(found[bits]) == best[bits]:
                cell = f"**{cell}**"
            row[f"{bits:g}"] = cell
        out.append(row)
    return out


def contest(rows: Sequence[Mapping[str, Any]], budgets: Sequence[float]) -> list[dict[str, Any]]:
    """Ours and the best method or allocator of each budget. A ratio is the mean over seeds of ratios of the loss."""
    out = []
    for bits in budgets:
        at = [row for row in rows if row["bits"] == bits]
        ours = {row["seed"]: row for row in at if row["method"] == OURS}
        others: dict[str, dict[int, float]] = {}
        for row in at:
            if row["kind"] != "ours" and row["seed"] in ours:
                others.setdefault(row["method"], {})[row["seed"]] = ours[row["seed"]]["loss"] / row["loss"]
        full = {m: list(r.values()) for m, r in others.items() if len(r) == len(ours)}
        if not ours or not full:
            continue
        rival = max(full, key=lambda m: statistics.fmean(full[m]))
        shares = Counter[str]()
        for row in ours.values():
            shares.update(row["encoders"])
        total = sum(shares.values())
        out.append(
            {
                "bits": f"{bits:g}",
                "best other": rival,
                "ours / its loss": _spread(full[rival]),
                "ours is best": all(max(r[i] for r in full.values()) < 1 for i in range(len(ours))),
                "linears of ours": ", ".join(f"{n} {100 * c / total:.0f} %" for n, c in shares.most_common()),
            }
        )
    return out


def savings(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each uniform setting beside our loss at its size, and our size at its loss."""
    fronts = {seed: _points(rows, OURS, seed) for seed in {row["seed"] for row in rows}}
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "uniform":
            groups.setdefault(row["method"], []).append(row)
    out = []
    for setting, found in sorted(groups.items(), key=lambda item: (item[1][0]["of"], item[1][0]["bytes"])):
        ratios = [o / r["loss"] for r in found if (o := loss_at(fronts[r["seed"]], r["bytes"])) and r["loss"] > 0]
        saved = [100 * (1 - s / r["bytes"]) for r in found if (s := size_at(fronts[r["seed"]], r["loss"]))]
        out.append(
            {
                "setting": setting,
                "bpw": f"{statistics.fmean(r['bpw'] for r in found):.3f}",
                "bytes": max(r["bytes"] for r in found),
                "loss": _spread([r["loss"] for r in found]),
                "ours / its loss": _spread(ratios) if ratios else None,
                "bytes saved, %": _spread(saved) if saved else None,
            }
        )
    return out


def _points(rows: Sequence[Mapping[str, Any]], method: str, seed: int) -> list[Point]:
    return [(r["bytes"], r["loss"]) for r in rows if r["method"] == method and r["seed"] == seed]


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4g}"
    return f"{statistics.fmean(values):.4g} ± {(max(values) - min(values)) / 2:.2g}"


def drawn(rows: Sequence[Mapping[str, Any]]) -> str:
    """Loss over bits a weight, geometric means over seeds: methods planned, uniform settings, allocators."""
    first, scope = rows[0], rows[0]["scope"]
    most = max(row["bits"] for row in rows if row["kind"] == "planned") + 0.75
    mine = [row for row in rows if row["scope"] == scope and row["bpw"] <= most]
    ours = {OURS: _curve(r for r in mine if r["method"] == OURS)}
    panels = []
    for heading, kind, name in (
        ("each method planned alone", "planned", "method"),
        ("uniform settings of each method", "uniform", "of"),
        (f"allocators, all over {LEVEL_FIELD}", "allocator", "method"),
    ):
        chosen = [row for row in mine if row["kind"] == kind]
        methods = dict.fromkeys(row[name] for row in chosen)
        panels.append((heading, ours | {m: _curve(r for r in chosen if r[name] == m) for m in methods}))
    title = f"{first['network']}: {first['loss name']} over bits a weight ({scope})"
    return picture(title, panels, OURS, "bits a weight")


def _curve(rows: Any) -> list[Point]:
    """(bits a weight, geometric mean of the loss) by budget or by setting."""
    groups: dict[tuple[str, Any], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["bits"]), []).append(row)
    return [
        (statistics.fmean(r["bpw"] for r in found), math.exp(statistics.fmean(math.log(r["loss"]) for r in found)))
        for found in groups.values()
        if all(r["loss"] > 0 for r in found)
    ]


if __name__ == "__main__":
    sys.exit(main())
