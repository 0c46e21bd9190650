"""The composition of the acts: open → calibrate → candidates → plan → apply → evaluate → report.

``library.py`` offers them one by one instead. Each act's result is a value or lies in the work folder; no act
reaches back into an earlier one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from layerwise.acts.activations import input_grids
from layerwise.acts.apply import Applied, apply_plan, plan_of
from layerwise.acts.candidates import find_candidates
from layerwise.acts.disk import check_disk, keeps_statistics
from layerwise.acts.images import Given
from layerwise.acts.kept import Candidates, overlay, rebuilt, uniform_plan, with_removals
from layerwise.acts.measuring import NetworkMeasures
from layerwise.acts.opening import network_rewrite
from layerwise.acts.prepare import Options, Prepared, prepare
from layerwise.acts.quality import smallest_within
from layerwise.acts.record import make_evidence, write_reports
from layerwise.acts.refit import refit, refit_by_pass
from layerwise.acts.removal import find_removals
from layerwise.acts.sequential import propagate
from layerwise.acts.tuning import tune
from layerwise.acts.uniform import Baseline, find_baseline
from layerwise.acts.wanted import predicts, wanted_by
from layerwise.calibrate.inputs import reached_input_parts
from layerwise.calibrate.passes import Calibration, forward, reverse, reverse_uniform
from layerwise.encoding.inputs import InputGrid
from layerwise.engine.journal import Journal, identity_of
from layerwise.engine.machine import peak_memory, versions
from layerwise.engine.memory import give_back, large_apart
from layerwise.engine.progress import Progress, Stopwatch
from layerwise.errors import InputError
from layerwise.evaluate.compare import Measured, compare
from layerwise.network.artifact import staged
from layerwise.network.overlay import Overlay
from layerwise.plan.constraints import constrain
from layerwise.plan.file import PlanFile, read_plan
from layerwise.plan.fused import fused, without_formats
from layerwise.plan.pareto import Pareto
from layerwise.plan.tree import Allocation, Node, leaves
from layerwise.recipe import parse_allocator, parse_recipe, parse_tuner
from layerwise.technique import SECOND_MOMENT


@dataclass(frozen=True)
class Result:
    """A finished run: where it is, what it measured, what was chosen."""

    out: Path
    evidence: dict[str, Any]
    allocation: Allocation
    applied: Applied


def compress(options: Options, progress: Progress | None = None, command: str = "", given: Given = Given()) -> Result:
    """Run every act and write the artifact to ``options.out``.

    Raises ``InputError`` before any long work for whatever the user got wrong. A run that is interrupted leaves its
    work folder, and the same call continues it.
    """
    if not any((options.budget, options.quality_loss, options.uniform, options.plan)):
        raise InputError(
            "give a --budget such as 4.5bpw, 12MB or 25%, a --quality-loss such as 1%, a --uniform recipe or a --plan"
        )
    watch = Stopwatch(progress)
    with large_apart():
        prepared, calibration, fingerprint = start(options, watch, given)
        try:
            result = run(prepared, calibration, watch, fingerprint, command)
        except BaseException:
            calibration.journal.close()
            raise
        calibration.journal.close(remove=options.work is None)
        return result


def start(options: Options, watch: Stopwatch, given: Given = Given()) -> tuple[Prepared, Calibration, str]:
    """Everything up to the first long step: (what was checked, the work folder taken, the weights' hash)."""
    with watch.stage("open and check", 1) as advance:
        prepared = prepare(options, given)
        folder = work_folder(options)
        check_disk(prepared, folder)
        fingerprint = prepared.network.checkpoint.fingerprint()
        advance()
    with watch.stage("check weights", 1) as advance:
        prepared.network.checkpoint.check_finite()
        give_back()
        advance()
    if options.plan:
        read_plan(options.plan).check_against(s.name for s in prepared.network.tree.sites)
    calibration = begin(prepared, folder, fingerprint)
    watch.note(reach(prepared))
    return prepared, calibration, fingerprint


def reach(prepared: Prepared) -> str:
    """What sizes this run can reach, in one line."""
    parameters, sizes = prepared.network.tree.parameters, prepared.range

    def size(count: int) -> str:
        return f"{count / 1e6:.2f} MB ({8 * count / parameters:.2f}bpw)"

    return f"reachable sizes: {size(sizes.smallest)} to {size(sizes.largest)}"


def work_folder(options: Options) -> Path:
    """The given one, else a folder beside OUT that is removed when the run succeeds."""
    if options.work:
        return Path(options.work)
    out = Path(options.out)
    return out.with_name(out.name + ".work")


def begin(prepared: Prepared, folder: Path, fingerprint: str) -> Calibration:
    """Take (or take up again) the work folder."""
    import torch

    torch.set_num_threads(prepared.options.threads)
    journal = Journal(folder, identity_of(identity(prepared, fingerprint)))
    calibration = Calibration(
        prepared.network, prepared.loss, prepared.splits, journal, prepared.options.seed, prepared.options.device,
        needs_whole_inputs(prepared), wanted_by(recipes_of(prepared)),
    )  # fmt: skip
    for entry in prepared.options.redo:
        redo(calibration, entry.partition("=")[0])
    return calibration


def needs_whole_inputs(prepared: Prepared) -> bool:
    """Whether a technique that may run minimises ``tr(D H D^T)`` itself, and so needs ``H`` whole."""
    return any(SECOND_MOMENT in parse_recipe(recipe).needs for recipe in recipes_of(prepared))


def recipes_of(prepared: Prepared) -> tuple[str, ...]:
    """Every recipe that may run."""
    return (*prepared.menu.linear, *prepared.menu.table, *prepared.only.values())


def identity(prepared: Prepared, fingerprint: str) -> dict[str, Any]:
    """Everything that decides what the passes compute; budgets and evaluation text do not."""
    options = prepared.options
    return {
        "weights": fingerprint,
        "tokens": prepared.splits.fingerprint(),
        "menu": [prepared.menu.linear, prepared.menu.table],
        **({"surgeons": prepared.menu.surgeons} if prepared.menu.surgeons else {}),
        "fix": list(options.fix),
        "loss": [prepared.loss.kind, prepared.loss.pooling],
        "seed": options.seed,
        "threads": options.threads,
        "device": options.device,
        "dtype": str(prepared.network.plain_dtype),
        "versions": versions(),
        **({"rewrite": str(network_rewrite(options.rewrite))} if options.rewrite else {}),
        **({"target": prepared.menu.target.name} if prepared.menu.target is not None else {}),
    }


def redo(calibration: Calibration, site: str) -> None:
    """Forget the unit that holds a site, so that it is encoded again with the recipe now asked for."""
    unit = calibration.unit_of(calibration.network.tree.find(site))
    for stage in ("candidates", "uniform"):
        calibration.journal.forget(f"{stage}/{unit}")


def run(prepared: Prepared, calibration: Calibration, watch: Stopwatch, fingerprint: str, command: str) -> Result:
    options = prepared.options
    candidates = measure_candidates(prepared, calibration, watch)
    with watch.stage("plan", 1) as advance:
        tree = constrain(candidates.tree(), options.keep, ())
        allocation, budget = allocate(prepared, calibration, candidates, tree, watch)
        advance()
    chosen = {name: c.recipe for name, c in allocation.sites.items()}
    splits = prepared.splits
    batches = splits.all if options.uniform else (*splits.fit, *splits.judge)
    if options.sequential:
        written = propagate(calibration, candidates, chosen, batches, options.workers, watch)
    elif options.uniform:
        written = candidates  # encoded on all tokens already
    else:
        keeps = keeps_statistics(options, prepared.network)
        again = refit if keeps else refit_by_pass
        written = again(calibration, candidates, chosen, options.workers, watch)
    if options.tune:
        written = tune(calibration, written, chosen, parse_tuner(options.tune), batches, watch)
    stored = overlay(written, chosen)
    inputs = input_grids(
        stored, rebuilt(written, chosen).recipes, prepared.activations, calibration, (*splits.fit, *splits.judge)
    )
    out = Path(options.out)
    with staged(out, options.force) as part:
        with watch.stage("write", 1) as advance:
            applied = apply_plan(prepared, written, allocation, tree, budget, part, fingerprint, inputs)
            if options.uniform or options.plan:
                budget = applied.bytes  # nothing was asked but the recipes themselves
            advance()
        baseline = None
        if options.baseline and not options.uniform:
            baseline = find_baseline(prepared, calibration, candidates, applied.bytes, watch)
        measured = measure(prepared, calibration, stored, baseline, watch, inputs)
        evidence = make_evidence(
            prepared, calibration, candidates, for_engine(prepared, tree), allocation, applied, baseline, measured,
            budget, fingerprint, command, watch,
        )  # fmt: skip
        evidence["seconds"] = {k: round(v, 2) for k, v in watch.seconds.items()}
        evidence["seconds"]["total"] = round(sum(watch.seconds.values()), 2)
        evidence["peak_memory"] = peak_memory()
        write_reports(part, evidence)
    return Result(out, evidence, allocation, applied)


def measure_candidates(prepared: Prepared, calibration: Calibration, watch: Progress) -> Candidates:
    """The forward and the reverse pass, or what is left of them."""
    options = prepared.options
    stage, parts = ("uniform", reverse_uniform) if options.uniform else ("candidates", reverse)
    if not predicts(prepared):
        parts = reached_input_parts
    if predicts(prepared) or any(parse_recipe(recipe).rewrites for recipe in recipes_of(prepared)):
        forward(calibration, watch)  # else it runs as its inputs are measured; rewrites are tried on them before that
    found = find_candidates(
        calibration, prepared.menu, options.workers, watch, stage, prepared.only, parts,
        keeps_statistics(options, prepared.network), prepared.menu.target is not None,
    )  # fmt: skip
    if not predicts(prepared):
        found = found.without_damages()
    for surgeon in prepared.menu.surgeons:
        find_removals(calibration, found, stage, watch)
        found = with_removals(calibration, found, surgeon, stage)
    return found


def plan_only(options: Options, progress: Progress | None = None) -> PlanFile:
    """A plan for ``options.budget`` from the work folder, which is filled first if it has to be."""
    watch = Stopwatch(progress)
    prepared, calibration, fingerprint = start(options, watch)
    try:
        candidates = measure_candidates(prepared, calibration, watch)
        tree = constrain(candidates.tree(), options.keep, ())
        allocation, budget = allocate(prepared, calibration, candidates, tree, watch)
    finally:
        calibration.journal.close()
    return plan_of(prepared, candidates, allocation, tree, budget, fingerprint)


def allocate(
    prepared: Prepared, calibration: Calibration, candidates: Candidates, tree: Node, watch: Stopwatch
) -> tuple[Allocation, int]:
    """(what is chosen at every site, the budget in bytes of the file)."""
    options, fixed = prepared.options, prepared.range.fixed
    if options.uniform:
        wanted = uniform_plan(candidates, prepared.menu.linear[0], prepared.menu.table[0])
        sites = {leaf.name: next(c for c in leaf.candidates if c.recipe == wanted[leaf.name]) for leaf in leaves(tree)}
        allocation = Allocation(sites, candidates.alternatives(wanted))
        return allocation, fixed + allocation.bytes
    if options.plan:
        allocation = read_plan(options.plan).choose(tree)
        return allocation, fixed + allocation.bytes
    planned = for_engine(prepared, tree)
    if prepared.quality is not None:
        allocation = without_formats(smallest_within(prepared, calibration, candidates, planned))
        return allocation, fixed + allocation.bytes
    assert prepared.budget is not None
    budget = prepared.budget.bytes(prepared.network.tree.parameters, prepared.network.checkpoint.safetensors_bytes)
    planner = parse_allocator(options.allocators[0]) if options.allocators else Pareto()
    measures = NetworkMeasures(calibration, candidates, "candidates", watch)
    return without_formats(planner.allocate(planned, budget - fixed, measures)), budget


def for_engine(prepared: Prepared, tree: Node) -> Node:
    """The tree in which sites that the target's engine multiplies as one choose their format together."""
    target = prepared.menu.target
    if target is None or prepared.options.uniform or prepared.options.plan:
        return tree
    return fused(tree, target, {s.name: s.columns for s in prepared.network.tree.sites})


def measure(
    prepared: Prepared,
    calibration: Calibration,
    plan: Overlay,
    baseline: Baseline | None,
    watch: Stopwatch,
    inputs: Mapping[str, InputGrid] = MappingProxyType({}),
) -> Mapping[str, Measured]:
    """Dense, plan, plan with quantized activations (``inputs``) and baseline on the held-out text."""
    network = prepared.network
    variants = {"plan": plan, **({"activations": plan.giving(inputs)} if inputs else {})}
    if baseline is not None:
        variants["baseline"] = baseline.weights
    with watch.stage("evaluate", (1 + len(variants)) * len(network.parts)) as advance:
        return compare(
            network, variants, prepared.loss, prepared.evaluation.batches, calibration.folder,
            prepared.options.device, advance,
        )  # fmt: skip
