"""Measured latency against quality: rounded, pruned, factorized, with blocks left out, and with blocks side by side.

    python benchmarks/latency_quality.py [NETWORK] [--bits 8 5 4 3 2] [--rounds 15] [--alone] [--picture FILE.svg]

    dense                   the checkpoint as it is
    quantize                plans of the default menu at ``--bits``, multiplied from the packed form
    quantize, int8 inputs   the same with inputs rounded to int8, where the form has such a kernel
    prune, depth, factorize networks that a surgeon makes (``--surgeons``), dense and plain
    factorize               ``--factors`` on every linear: two thin products in place of one
    depth, rounded          ``--drops`` blocks left out and the rest planned at ``--drop-bits``

Every network is written, loaded again as a user would, and kept in memory beside the others: one process, one thread
unless ``--threads`` says more, float32 activations. The losses are of those very modules on held-out text. Times are
medians of rounds in which all take turns, after one run of each that is not counted; ± is half of what lies between the
quartiles. The search is that of ``compress_quality.py``: with the same settings they share a work folder.

Nothing is trained after the surgery.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.compress_quality import encoders_of
from benchmarks.fronts import front_of, save_picture
from benchmarks.quality import with_spearman
from benchmarks.quantize_search import ALL, Search, canonical, searched
from benchmarks.runs import add_run_options, run_options, texts
from benchmarks.tables import Table, add_output_options, publish

from layerwise.acts.apply import form_layout, write_network
from layerwise.acts.candidates import stored_bytes
from layerwise.acts.kept import Candidates, Rebuilt, Stored, rebuilt
from layerwise.acts.refit import encode
from layerwise.engine.journal import identity_of
from layerwise.errors import InputError
from layerwise.evaluate.compare import Sums
from layerwise.jobs.reshape import operated
from layerwise.kernels.doctor import processor
from layerwise.kernels.library import chosen_path
from layerwise.network.load import load
from layerwise.network.network import output_width
from layerwise.network.packed import set_activations
from layerwise.network.sizes import largest_file
from layerwise.network.streaming import rows_at_once
from layerwise.plan.constraints import is_dense
from layerwise.plan.tree import Candidate
from layerwise.recipe import parse_surgeon

DENSE, QUANTIZE, INT8, FACTORIZE, BOTH = "dense", "quantize", "quantize, int8 inputs", "factorize", "depth, rounded"
SURGEONS = (
    "structured:channels=0.25", "structured:channels=0.5", "structured:heads=0.34,channels=0.25",
    "structured:heads=0.34,channels=0.5", "drop_block:count=1", "drop_block:count=2", "drop_block:count=3",
    "drop_block:count=1,measure=influence", "drop_block:count=2,measure=influence", "deep_to_shallow:blocks=2",
    "deep_to_shallow:blocks=3,order=2", "relaxed_recursive:rank=16",
)  # fmt: skip
FACTORS = ("svd:ratio=0.5", "asvd:ratio=0.8", "asvd:ratio=0.5", "svd_llm:ratio=0.8,curvature=loss",
           "svd_llm:ratio=0.5,curvature=loss", "svd_llm:ratio=0.25,curvature=loss")  # fmt: skip
PROMPT, STEPS = 64, 16
SETTLED = 0.02  # seconds between two timings: threads of the one before spin for some time


@dataclass(frozen=True)
class Variant:
    """A network in memory, as it is timed and measured. ``bytes`` of its weights file."""

    family: str
    name: str
    module: nn.Module
    bytes: int
    int8: bool = False


Times = dict[str, list[float]]
"""Variant -> milliseconds of each round."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_run_options(parser)
    parser.set_defaults(threads=1)
    parser.add_argument("--bits", type=float, nargs="*", default=[8, 5, 4, 3, 2], help="of plans (%(default)s)")
    parser.add_argument("--surgeons", nargs="*", default=SURGEONS, metavar="SURGEON", help="networks of another shape")
    parser.add_argument("--factors", nargs="*", default=FACTORS, metavar="RECIPE", help="on every linear")
    parser.add_argument(
        "--drops", type=int, nargs="*", default=[1, 2], help="blocks left out and rounded (%(default)s)"
    )
    parser.add_argument("--drop-bits", type=float, nargs="+", default=[4], help="of what is left (%(default)s)")
    parser.add_argument("--families", nargs="+", default=["prune", "factorize"], help="of the shared search")
    parser.add_argument("--without", nargs="+", default=[], metavar="TECHNIQUE", help="as for compress_quality.py")
    parser.add_argument("--only", nargs="+", default=[], metavar="TECHNIQUE", help="as for compress_quality.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=15, help="timings of each network (%(default)s)")
    parser.add_argument("--alone", action="store_true", help="keep other processes off while one is timed (SCHED_FIFO)")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="write the fronts here, as SVG")
    add_output_options(parser)
    given = parser.parse_args(arguments)
    methods = [name for family in given.families for name in encoders_of(family, given.without, given.only)]
    refused: dict[str, str] = {}
    with (
        texts(given) as (calibrate, evaluate),
        tempfile.TemporaryDirectory(prefix="layerwise-") as folder,
        searched(given, run_options(given, calibrate, evaluate, given.seed), methods, refused) as search,
    ):
        torch.set_num_threads(given.threads)
        variants = list(made(search, given, Path(folder), refused))
        scores = measured(search, variants, given.seed)
        taken = timed(search, variants, given.rounds, given.alone)
        rows = rows_of(search, variants, scores, taken)
    for name, reason in refused.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    how = f"{processor()}, {given.threads} thread{'s' if given.threads > 1 else ''}, kernels: {chosen_path() or 'none'}"
    found = {"benchmark": "latency_quality", "processor": how, "rows": rows, "left out": refused}
    publish(given, tables_of(rows, list(taken), how), found)
    if given.picture:
        write_picture(given, rows, list(taken))
    return 0


# ---------------------------------------------------------------- the networks


def made(search: Search, given: argparse.Namespace, folder: Path, refused: dict[str, str]) -> Iterator[Variant]:
    """Every network, written and loaded again; ``refused`` receives those that this one cannot be."""
    network, run = search.run.prepared.network, search.run
    checkpoint = network.checkpoint
    yield Variant(DENSE, "dense", load(checkpoint.directory, torch.float32), checkpoint.safetensors_bytes)
    for bits, plan in zip(given.bits, planned(search, given.bits, refused), strict=True):
        if plan is not None:
            found = written(rebuilt(search.written(plan), plan), folder / f"{bits:g}bpw")
            yield Variant(QUANTIZE, f"{bits:g} bits", *found)
            yield Variant(INT8, f"{bits:g} bits, int8 inputs", *found, int8=True)
    for text in given.surgeons:
        surgeon = parse_surgeon(text)
        try:
            result = operated(surgeon, network, run.calibration, run.watch)
        except InputError as reason:
            refused[text] = str(reason)
            continue
        yield Variant(surgeon.family, text, *written(Rebuilt(result, {}, {}, {}), folder / text))
    for recipe in given.factors:
        chosen = everywhere(search, canonical(recipe))
        found = written(rebuilt(encoded_as(search, chosen), chosen), folder / recipe)
        yield Variant(FACTORIZE, recipe, *found)
    for count in given.drops:
        own = search.with_removals(f"drop_block:count={count}", ())
        for bits, plan in zip(given.drop_bits, planned(search, given.drop_bits, refused, own), strict=True):
            if plan is not None:
                found = written(rebuilt(search.written(plan), plan), folder / f"drop {count} {bits:g}bpw")
                yield Variant(BOTH, f"{count} left out, {bits:g} bits", *found)


def planned(
    search: Search, budgets: Sequence[float], refused: dict[str, str], own: Candidates | None = None
) -> list[Mapping[str, str] | None]:
    """The recipes of the plan of each budget; None where there is none so small."""
    candidates = search.offered(()) if own is None else own
    found = {p.bits: p.recipes for p in search.planned("family", QUANTIZE, candidates, ALL, budgets)}
    for bits in budgets:
        if bits not in found:
            refused[f"{bits:g} bits"] = "no plan is so small"
    return [found.get(bits) for bits in budgets]


def everywhere(search: Search, recipe: str) -> dict[str, str]:
    """One recipe on every linear of the blocks that the loss reaches; elsewhere 16 bits, or what is cheap."""
    chosen = {}
    for name, found in search.run.candidates.sites.items():
        offered = [c.recipe for c in found.candidates]
        plain = next((r for r in offered if is_dense(r)), offered[0])
        chosen[name] = recipe if name in search.linears and found.site.block and found.reached else plain
    return chosen


def encoded_as(search: Search, recipes: Mapping[str, str]) -> Candidates:
    """Recipes that the search need not have tried, encoded from the statistics that it kept."""
    run, candidates = search.run, search.run.candidates
    journal, network = run.calibration.journal, run.prepared.network
    (run.calibration.folder / "refit").mkdir(exist_ok=True)
    sites = dict(candidates.sites)
    for name, recipe in recipes.items():
        found = candidates.sites[name]
        if recipe in [c.recipe for c in found.candidates]:
            continue
        key = identity_of({"as": recipe})[:16]
        unit = f"as/{name}/{key}"
        if not journal.has(unit):
            spec = encode(run.calibration, candidates, recipes, found.site.block, [name], key, 1)[name]
            journal.record(unit, spec)
        size = stored_bytes(name, form_layout(network, name, recipe), largest_file(network))
        stored = Stored(run.calibration.folder / "refit" / f"{name}.{key}.safetensors", 0, journal[unit])
        sites[name] = replace(found, candidates=(Candidate(recipe, size, 0.0),), stored=(stored,))
    return replace(candidates, sites=sites)


def written(result: Rebuilt, folder: Path) -> tuple[nn.Module, int]:
    """(the network as a user would load it, bytes of its file)."""
    folder.mkdir()
    size = write_network(result, folder)
    return load(folder, dtype=torch.float32), size


# ---------------------------------------------------------------- quality and time


@torch.inference_mode()
def measured(search: Search, variants: Sequence[Variant], seed: int) -> dict[str, dict[str, float]]:
    """Variant -> metrics on the held-out text, of the modules that are timed."""
    prepared = search.run.prepared
    loss, sums = prepared.loss, {v.name: Sums() for v in variants}
    extra = {"use_cache": False} if loss.causal else {}
    width = output_width(prepared.network)
    parts = [b.rows(*span) for b in prepared.evaluation.batches for span in rows_at_once(b, width)]
    with search.run.watch.stage("measure losses", len(parts)) as advance:
        for part in parts:
            dense: Tensor | None = None
            for variant in variants:
                set_activations(variant.module, "int8" if variant.int8 else "exact")
                target = loss.target(variant.module(**part.arguments(), **extra), part)
                dense = target if dense is None else dense
                sums[variant.name].add(loss, part, dense, target)
            advance()
    return {name: with_spearman(search.run, found.measured(loss), seed) for name, found in sums.items()}


@torch.inference_mode()
def timed(search: Search, variants: Sequence[Variant], rounds: int, alone: bool) -> dict[str, Times]:
    """Workload -> variant -> milliseconds."""
    network = search.run.prepared.network
    vocabulary = network.module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)

    def words(*shape: int) -> Tensor:
        return torch.randint(5, vocabulary, shape, generator=generator)

    if search.run.prepared.loss.causal:
        text, prompt = words(1, 256), words(1, PROMPT + STEPS)
        workloads: dict[str, Callable[[nn.Module], float]] = {
            "256 tokens at once": lambda module: once(module, text, {"use_cache": False}),
            "each next token": lambda module: next_tokens(module, prompt),
        }
    else:
        texts_of_32, text = words(16, 32), words(1, 32)
        workloads = {
            "16 texts of 32 tokens": lambda module: once(module, texts_of_32, {}),
            "a text of 32 tokens": lambda module: once(module, text, {}),
        }
    taken: dict[str, Times] = {title: {v.name: [] for v in variants} for title in workloads}
    with search.run.watch.stage("time", rounds) as advance:
        for _ in range(rounds):
            for variant in variants:
                set_activations(variant.module, "int8" if variant.int8 else "exact")
                with foremost(alone):
                    for title, run in workloads.items():
                        run(variant.module)  # what ran before had other weights
                        taken[title][variant.name].append(1e3 * run(variant.module))
                time.sleep(SETTLED)
            advance()
    return taken


def once(module: nn.Module, tokens: Tensor, more: Mapping[str, Any]) -> float:
    """Seconds of one forward pass."""
    began = time.perf_counter()
    module(input_ids=tokens, **more)
    return time.perf_counter() - began


def next_tokens(module: nn.Module, tokens: Tensor) -> float:
    """Seconds of one more token behind a prompt, with the cache; which tokens these are costs nothing."""
    cache = module(input_ids=tokens[:, :PROMPT], use_cache=True).past_key_values
    began = time.perf_counter()
    for i in range(PROMPT, PROMPT + STEPS):
        cache = module(input_ids=tokens[:, i : i + 1], past_key_values=cache, use_cache=True).past_key_values
    return (time.perf_counter() - began) / STEPS


@contextlib.contextmanager
def foremost(wanted: bool) -> Iterator[None]:
    """Run before every ordinary process, for as short as one network is timed."""
    if not wanted:
        yield
        return
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


# ---------------------------------------------------------------- what is printed


def rows_of(
    search: Search,
    variants: Sequence[Variant],
    scores: Mapping[str, Mapping[str, float]],
    taken: Mapping[str, Times],
) -> list[dict[str, Any]]:
    prepared = search.run.prepared
    rows: list[dict[str, Any]] = []
    for variant in variants:
        times = {title: of[variant.name] for title, of in taken.items()}
        rows.append(
            {
                "network": prepared.network.name,
                "family": variant.family,
                "variant": variant.name,
                "bytes": variant.bytes,
                "loss name": prepared.loss.name,
                "loss": scores[variant.name][prepared.loss.name],
                "metrics": dict(scores[variant.name]),
                "ms": {title: statistics.median(t) for title, t in times.items()},
                "spread": {title: half_quartiles(t) for title, t in times.items()},
            }
        )
    for title in taken:
        best = set(front_of([(r["ms"][title], r["loss"]) for r in rows[1:]]))  # the dense network has no loss to draw
        for row in rows:
            row.setdefault("front", {})[title] = (row["ms"][title], row["loss"]) in best and (
                row["ms"][title] < rows[0]["ms"][title]
            )
    return rows


def half_quartiles(values: Sequence[float]) -> float:
    if len(values) < 4:
        return (max(values) - min(values)) / 2
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


def tables_of(rows: Sequence[Mapping[str, Any]], titles: Sequence[str], how: str) -> list[Table]:
    dense, name, loss = rows[0], rows[0]["network"], rows[0]["loss name"]
    shown = []
    for row in rows:
        cells: dict[str, Any] = {"family": row["family"], "network": row["variant"], "MB": f"{row['bytes'] / 1e6:.2f}"}
        for title in titles:
            cells[f"{title}, ms"] = f"{row['ms'][title]:.3g} ± {row['spread'][title]:.2g}"
            cells[f"{title}, × dense"] = f"{row['ms'][title] / dense['ms'][title]:.2f}"
        cells |= {metric: f"{value:.4g}" for metric, value in row["metrics"].items() if metric != "agreement"}
        cells["on the front of"] = ", ".join(t for t in titles if row["front"][t]) or "–"
        shown.append(cells)
    found = [Table.of(f"{name}: latency and {loss}; {how}", shown)]
    for title in titles:
        if equal := at_equal_latency(rows, title):
            found.append(Table.of(f"{name}: least {loss} of each family no slower than a depth plan, {title}", equal))
    return found


def at_equal_latency(rows: Sequence[Mapping[str, Any]], title: str) -> list[dict[str, Any]]:
    """A row for every network with fewer or parallel blocks: what else is to be had in its time, by family."""
    others = [f for f in dict.fromkeys(r["family"] for r in rows[1:]) if f != "depth"]
    out = []
    for row in rows:
        if row["family"] not in ("depth", BOTH):
            continue
        cells: dict[str, Any] = {
            "network": row["variant"], "ms": f"{row['ms'][title]:.3g}", "its loss": f"{row['loss']:.3g}",
        }  # fmt: skip
        for family in others:
            fits = [r for r in rows if r["family"] == family and r is not row and r["ms"][title] <= row["ms"][title]]
            best = min(fits, key=lambda r: r["loss"]) if fits else None
            cells[family] = f"{best['loss']:.3g} ({best['variant']})" if best else "–"
        out.append(cells)
    return out


def write_picture(given: argparse.Namespace, rows: Sequence[Mapping[str, Any]], titles: Sequence[str]) -> None:
    """Loss over time as a share of the dense network's, a panel a workload, the front of each family."""
    dense, panels = rows[0], []
    for title in titles:
        families = dict.fromkeys(row["family"] for row in rows[1:])
        points = {
            f: [(r["ms"][title] / dense["ms"][title], r["loss"]) for r in rows if r["family"] == f] for f in families
        }
        panels.append((title, {family: front_of(of) for family, of in points.items()}))
    title = f"{dense['network']}: {dense['loss name']} over time, dense = 1; the front of each family"
    save_picture(given.picture, given.markdown, title, panels, "", "time, dense = 1")


if __name__ == "__main__":
    sys.exit(main())
