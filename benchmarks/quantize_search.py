"""One search of a network that serves every method, budget and allocator, and the loss of every plan made of it.

All recipes are encoded in one reverse pass; each method is then given its own candidates only. What a plan takes is
encoded again on fit and judge tokens together, as the product does, once for every pair of site and recipe whatever
the number of plans that take it. Candidates, encodings and losses are journaled: a run that was ended goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.quality import only, recipes_of, with_spearman
from benchmarks.runs import Run, resumed

from layerwise.acts.apply import linear_bytes, predicted_bytes
from layerwise.acts.candidates import distinct, find_candidates
from layerwise.acts.images import Given
from layerwise.acts.kept import Candidates, Stored, overlay, rebuilt, with_removals
from layerwise.acts.measuring import NetworkMeasures
from layerwise.acts.prepare import Options, prepare
from layerwise.acts.refit import encode, needs_refit
from layerwise.acts.removal import find_removals
from layerwise.acts.rewriting import Rewriter, chain_of, chains, encoder_of
from layerwise.acts.sequential import propagate
from layerwise.acts.shortlist import shortlist
from layerwise.calibrate.passes import forward
from layerwise.cli.shared import Bar
from layerwise.engine.journal import identity_of
from layerwise.engine.progress import Stopwatch
from layerwise.engine.workers import each
from layerwise.errors import InputError
from layerwise.evaluate.compare import compare
from layerwise.network.overlay import Overlay
from layerwise.plan.constraints import is_dense
from layerwise.plan.menu import LINEARS_ONLY, Menu, fitted, make_menu, uniform_recipes
from layerwise.plan.pareto import Pareto
from layerwise.plan.tree import Node
from layerwise.recipe import parse_allocator, parse_recipe, surgery
from layerwise.roles import Allocator

STAGE = "quantize"
TABLES = "rtn:bits=8,group=0"  # the identical tables of the comparison of linears alone
ALL, LINEARS = "all bytes", "linears only"
TOGETHER = 12  # networks that stand in one pass over the held-out text
OURS, EVERYTHING = "layerwise", "all techniques"


@dataclass(frozen=True)
class Plan:
    """What is stored where. ``bits`` asked for, None for a uniform ``setting``; ``bytes`` of what the scope counts."""

    kind: str
    method: str
    scope: str
    bits: float | None
    bytes: int
    bpw: float
    predicted: float | None
    recipes: Mapping[str, str] = field(repr=False)
    setting: str = ""
    sequential: bool = False

    def key(self) -> str:
        return f"measured/{identity_of({'recipes': dict(self.recipes), 'sequential': self.sequential})[:24]}"


@contextmanager
def searched(
    given: argparse.Namespace,
    options: Options,
    methods: Sequence[str],
    refused: dict[str, str],
    handed: Given = Given(),
) -> Iterator[Search]:
    """Calibrate and encode what the work folder does not hold yet. ``refused`` receives the methods left out."""
    watch = Stopwatch(Bar(given.quiet))
    prepared = prepare(replace(options, techniques=()), handed)
    dtype = str(prepared.network.plain_dtype).removeprefix("torch.")
    prepared = replace(prepared, menu=union_of(methods, dtype))
    calibration = resumed(given, prepared)
    try:
        forward(calibration, watch)
        fits = [m for m in methods if not refusal(Rewriter(calibration), m, dtype, refused)]
        found = find_candidates(
            calibration, union_of(fits, dtype), options.workers, watch, STAGE, again=True, all_kept=True
        )  # fmt: skip
        yield Search(Run(prepared, calibration, found, watch), dtype, tuple(fits))
    finally:
        calibration.journal.close()


def refusal(rewriter: Rewriter, method: str, dtype: str, refused: dict[str, str]) -> bool:
    """Whether the network has no place for a method's rewrite."""
    asked = chains(make_menu((method,), dtype).linear)
    try:
        if asked:
            rewriter.refuse_impossible(asked)
    except InputError as reason:
        refused[method] = str(reason)
        return True
    return False


def union_of(methods: Sequence[str], dtype: str) -> Menu:
    """Every recipe of every method and of the default menu, and the tables that uniform settings stand beside."""
    menus = [make_menu((method,), dtype) for method in methods] + [make_menu((), dtype)]
    linear = distinct(recipe for menu in menus for recipe in menu.linear)
    beside = [uniform_recipes(parse_recipe(recipe), "same")[1] for recipe in linear if not is_dense(recipe)]
    tables = distinct([*(r for menu in menus for r in menu.table), *map(canonical, beside), canonical(TABLES)])
    return Menu(linear, tables)


def rounded_tables(menu: Menu, dtype: str) -> Menu:
    """A menu that keeps to the product's own rule: factors are for linears, and tables beside them are rounded."""
    kept = tuple(r for r in menu.table if is_dense(r) or parse_recipe(r).encoder.family != LINEARS_ONLY)
    return menu if kept == menu.table else replace(menu, table=distinct([*make_menu((), dtype).table, *kept]))


def canonical(recipe: str) -> str:
    return str(parse_recipe(recipe))


@dataclass
class Search:
    """The candidates of all methods on one network and one seed."""

    run: Run
    dtype: str
    methods: tuple[str, ...]
    again: dict[tuple[str, str], Stored] = field(default_factory=dict)

    def __post_init__(self) -> None:
        network = self.run.prepared.network
        self.linears = {s.name for s in network.tree.sites if s.kind == "linear"}
        self.linear_parameters = sum(s.parameters for s in network.tree.sites if s.name in self.linears)
        self.beside = {  # what is stored at every other site where linears alone are compared
            name: at if (at := fitted(canonical(TABLES), site.site.columns)) in offered else offered[0]
            for name, site in self.run.candidates.sites.items()
            if name not in self.linears and (offered := [c.recipe for c in site.candidates])
        }

    # ---------------------------------------------------------------- plans

    def offered(self, techniques: Sequence[str]) -> Candidates:
        return shortlist(self.run.candidates, rounded_tables(make_menu(tuple(techniques), self.dtype), self.dtype))

    def everything(self) -> Candidates:
        """What all methods and the default menu offer, without what only stands beside uniform settings."""
        menus = [make_menu((method,), self.dtype) for method in self.methods] + [make_menu((), self.dtype)]
        linear = distinct(recipe for menu in menus for recipe in menu.linear)
        table = distinct(recipe for menu in menus for recipe in menu.table)
        return shortlist(
            self.run.candidates, rounded_tables(replace(menus[-1], linear=linear, table=table), self.dtype)
        )

    def planned(
        self,
        kind: str,
        method: str,
        own: Candidates,
        scope: str,
        budgets: Sequence[float],
        allocator: Allocator = Pareto(),
    ) -> list[Plan]:
        """A plan at every budget that the candidates can reach."""
        tree: Node = own.tree() if scope == ALL else only(own.tree(), self.linears)
        measures = NetworkMeasures(self.run.calibration, own, STAGE, self.run.watch)
        plans = []
        for bits in budgets:
            try:
                allocation = allocator.allocate(tree, self.budget(scope, bits), measures)
                recipes = {**(self.beside if scope == LINEARS else {}), **recipes_of(allocation)}
                plans.append(self.plan(kind, method, scope, bits, recipes, allocation.damage))
            except InputError:
                continue  # the method has nothing so small, or takes every block out
        return plans

    def budget(self, scope: str, bits: float) -> int:
        """Bytes that the sites of a scope may take."""
        if scope == LINEARS:
            return int(bits * self.linear_parameters / 8)
        return int(bits * self.run.prepared.network.tree.parameters / 8) - self.run.prepared.range.fixed

    def plan(
        self, kind: str, method: str, scope: str, bits: float | None, recipes: dict[str, str], damage: float | None
    ) -> Plan:
        network = self.run.prepared.network
        if scope == LINEARS:
            size, count = linear_bytes(network, recipes), self.linear_parameters
        else:
            made = rebuilt(self.run.candidates, recipes)  # a plan may have taken blocks out
            size, count = predicted_bytes(made.network, made.recipes), network.tree.parameters
        return Plan(kind, method, scope, bits, size, 8 * size / count, damage, recipes)

    def allocated(self, allocator: str, technique: str, scope: str, budgets: Sequence[float]) -> list[Plan]:
        own = self.offered((technique,))
        return self.planned("allocator", allocator, own, scope, budgets, parse_allocator(allocator))

    def uniform(self, method: str, scope: str) -> list[Plan]:
        """Each setting of a method on every linear, beside tables on the same grid, or the tables all have."""
        plans = []
        for recipe in make_menu((method,), self.dtype).linear:
            if is_dense(recipe):
                continue
            table = canonical(uniform_recipes(parse_recipe(recipe), "same")[1] if scope == ALL else TABLES)
            chosen = {name: self.settled(name, recipe, table) for name in self.run.candidates.sites}
            if all(chosen.values()) and self.agree(chosen):
                recipes = {n: str(r) for n, r in chosen.items()}
                plans.append(replace(self.plan("uniform", method, scope, None, recipes, None), setting=recipe))
        return plans

    def settled(self, name: str, linear: str, table: str) -> str | None:
        """A uniform setting's recipe at one site; None where it did more harm than leaving the matrix out."""
        found = self.run.candidates.sites[name]
        offered = [c.recipe for c in found.candidates]
        if not found.reached or found.site.kind == "position":
            return offered[0]
        wanted = (linear, encoder_of(linear)) if name in self.linears else (table,)
        return next((r for w in wanted if (r := fitted(w, found.site.columns)) in offered), None)

    def agree(self, chosen: Mapping[str, str | None]) -> bool:
        """Whether the matrices of each block are all rewritten alike."""
        seen: dict[str, set[str]] = {}
        for name, recipe in chosen.items():
            if (block := self.run.candidates.sites[name].site.block) and recipe:
                seen.setdefault(block, set()).add(chain_of(recipe))
        return all(len(labels) == 1 for labels in seen.values())

    def with_removals(self, surgeon: str, techniques: Sequence[str] | None = None) -> Candidates:
        """The candidates of these techniques, or all, with the removal of each block beside them; measured once."""
        run = self.run
        find_removals(run.calibration, run.candidates, STAGE, run.watch)
        self.run = replace(run, candidates=with_removals(run.calibration, run.candidates, surgeon, STAGE))
        own = self.everything() if techniques is None else self.offered(techniques)
        return with_removals(run.calibration, own, surgeon, STAGE)

    # ---------------------------------------------------------------- losses

    def figures(self, plan: Plan, seed: int, scores: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """What a row says of any plan: the network, its size, and what was predicted and measured of it."""
        prepared = self.run.prepared
        return {
            "network": prepared.network.name,
            "seed": seed,
            "bits": plan.bits,
            "bytes": plan.bytes,
            "bpw": plan.bpw,
            "loss": scores[plan.key()][prepared.loss.name],
            "predicted": plan.predicted,
            "metrics": dict(scores[plan.key()]),
            "loss name": prepared.loss.name,
        }

    def measure(self, plans: Sequence[Plan], seed: int) -> dict[str, dict[str, float]]:
        """Plan's key -> metrics on the held-out text. Ctrl-C ends it early, with what is measured by then."""
        journal = self.run.calibration.journal
        todo = list({p.key(): p for p in plans if not journal.has(p.key())}.values())
        try:
            for start in range(0, len(todo), TOGETHER):
                self._measure(todo[start : start + TOGETHER], f"evaluate from {start} of {len(todo)}", seed)
        except KeyboardInterrupt:
            print("stopped: the plans that are not measured yet are left out", file=sys.stderr)
        return {key: journal[key] for p in plans for key in ("measured/dense", p.key()) if journal.has(key)}

    def _measure(self, plans: Sequence[Plan], title: str, seed: int) -> None:
        run, prepared = self.run, self.run.prepared
        weights = {plan.key(): self.weights(plan) for plan in plans}
        with run.watch.stage(title, (1 + len(plans)) * len(prepared.network.tree.blocks)) as advance:
            found = compare(
                prepared.network, weights, prepared.loss, prepared.evaluation.batches, run.calibration.folder,
                prepared.options.device, advance,
            )  # fmt: skip
        for key, measured in found.items():
            run.calibration.journal.record(
                "measured/dense" if key == "dense" else key, with_spearman(run, measured, seed)
            )

    def weights(self, plan: Plan) -> Overlay:
        written = self.written(plan.recipes)
        if plan.sequential:
            run, splits = self.run, self.run.prepared.splits
            batches = (*splits.fit, *splits.judge)
            workers = run.prepared.options.workers
            written = propagate(run.calibration, written, plan.recipes, batches, workers, run.watch)
        return overlay(written, plan.recipes)

    def written(self, recipes: Mapping[str, str]) -> Candidates:
        """The recipes encoded again on fit and judge tokens; a pair of site and recipe is encoded once."""
        run, journal = self.run, self.run.calibration.journal
        found = run.candidates
        (run.calibration.folder / "refit").mkdir(exist_ok=True)
        wanted = [n for n, recipe in recipes.items() if not surgery(recipe) and needs_refit(found, n, recipe)]
        keys = {name: identity_of({"stage": STAGE, "recipe": recipes[name]})[:16] for name in wanted}
        missing = [n for n in wanted if not journal.has(f"again/{n}/{keys[n]}")]

        def work(name: str) -> dict[str, object]:
            block = found.sites[name].site.block
            return encode(run.calibration, found, recipes, block, [name], keys[name], 1)[name]  # type: ignore[no-any-return]

        for name, spec in zip(missing, each(work, missing, run.prepared.options.workers), strict=True):
            journal.record(f"again/{name}/{keys[name]}", spec)
        sites = dict(found.sites)
        for name in wanted:
            file = run.calibration.folder / "refit" / f"{name}.{keys[name]}.safetensors"
            stored = Stored(file, 0, journal[f"again/{name}/{keys[name]}"])
            chosen = next(c for c in found.sites[name].candidates if c.recipe == recipes[name])
            sites[name] = replace(found.sites[name], candidates=(chosen,), stored=(stored,))
        return replace(found, sites=sites)
