"""The act *compare*: several techniques planned into the same bytes and measured on the same text.

One forward and one reverse pass serve all of them. Each technique then gets the planner over its own candidates, 16
bits included, and a last plan chooses among the candidates of all. Where allocators are named they take the place of
the techniques: each plans over the candidates of all. Every plan is encoded as ``compress`` would store it, and one
pass over the held-out text measures them beside the dense network. With several seeds all of it is repeated on another
draw of the calibration text, which says how far a difference can be trusted.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from layerwise.acts.apply import predicted_bytes
from layerwise.acts.candidates import find_candidates
from layerwise.acts.disk import keeps_statistics
from layerwise.acts.kept import Candidates, overlay, rebuilt, seconds_spent, with_removals
from layerwise.acts.measuring import NetworkMeasures
from layerwise.acts.prepare import Options, Prepared, check_budget, reachable
from layerwise.acts.refit import refit, refit_by_pass
from layerwise.acts.removal import find_removals
from layerwise.acts.shortlist import shortlist
from layerwise.calibrate.passes import Calibration, forward
from layerwise.compress import start
from layerwise.engine.machine import versions
from layerwise.engine.progress import Progress, Stopwatch
from layerwise.errors import InputError
from layerwise.evaluate.compare import compare
from layerwise.network.network import open_network
from layerwise.network.overlay import Overlay
from layerwise.plan.budget import Budget, parse_budget
from layerwise.plan.menu import Menu, make_menu
from layerwise.plan.pareto import Pareto
from layerwise.recipe import parse_allocator, surgery
from layerwise.roles import Allocator

STAGE = "side by side"
TOGETHER = "all together"
USUAL = ("trellis", "two_sided", "gptq", "hqq", "rtn")  # what compress takes, and what other tools do


@dataclass(frozen=True)
class Method:
    """One plan a seed, means over seeds. ``technique`` (or allocator) as it was asked for, or ``all together``.

    bytes:     of the largest weights file; never more than the budget.
    predicted: damage of the plan, in the loss's unit.
    metrics:   measured on the held-out text.
    seconds:   of rewriting blocks and encoding all of the candidates, on one core; the passes are shared.
    sites:     encoder -> how many sites it got, of all seeds together.
    spread:    half the range of each metric over the seeds.
    best_at:   seeds at which no other plan has less loss.
    """

    technique: str
    bytes: int
    bpw: float
    predicted: float
    metrics: dict[str, float]
    seconds: float
    sites: dict[str, int]
    spread: dict[str, float] = field(default_factory=dict)
    best_at: int = 0


@dataclass(frozen=True)
class Comparison:
    """Methods in the order asked for, the joint plan last. ``budget`` in bytes; ``seconds`` by stage, of all.

    left_out: of the usual techniques -> why it cannot take part.
    """

    seeds: tuple[int, ...]
    network: str
    budget: int
    asked: str
    loss: str
    unit: str
    data: str
    dense: dict[str, float]
    methods: tuple[Method, ...]
    seconds: dict[str, float]
    versions: dict[str, str]
    command: str
    left_out: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def side_by_side(
    options: Options, progress: Progress | None = None, command: str = "", seeds: Sequence[int] = ()
) -> Comparison:
    """Plan each of ``options.techniques`` at ``options.budget``, and all together, and measure every plan.

    seeds: of the calibration, each with a folder of its own in the work folder; without them ``options.seed`` alone.

    Without techniques and allocators the usual techniques are compared, those that can reach the budget. Raises
    ``InputError`` before long work for whatever the user got wrong, and when a technique that was named cannot reach
    the budget.
    """
    left_out: dict[str, str] = {}
    if not options.techniques and not options.allocators:
        options, left_out = usual(options)
    check(options)
    runs = []
    for seed in seeds or (options.seed,):
        work = options.work if options.work is None or len(seeds) < 2 else str(Path(options.work) / f"seed-{seed}")
        runs.append(_compared(replace(options, seed=seed, work=work), progress, command))
    return replace(_over_seeds(runs), left_out=left_out)


def usual(options: Options) -> tuple[Options, dict[str, str]]:
    """Options that name the usual techniques, and why those are missing that cannot reach the budget."""
    left_out: dict[str, str] = {}
    if options.budget is not None:
        left_out = beyond(
            options,
            parse_budget(options.budget),
            {technique: make_menu((technique,), "float16") for technique in USUAL},
        )
    within = tuple(t for t in USUAL if t not in left_out)
    if len(within) < 2:
        raise InputError(
            f"of {', '.join(USUAL)} {f'only {within[0]}' if within else 'none'} can reach {options.budget}; "
            f"name at least two techniques that can with --techniques"
        )
    return replace(options, techniques=within), left_out


def _compared(options: Options, progress: Progress | None, command: str) -> Comparison:
    """One seed."""
    watch = Stopwatch(progress)
    with ExitStack() as stack:
        if options.work is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="layerwise-"))
            options = replace(options, work=str(Path(folder) / "work"))
        prepared, calibration, _ = start(options, watch)
        stack.callback(calibration.journal.close)
        forward(calibration, watch)
        again = keeps_statistics(options, prepared.network)
        found = find_candidates(
            calibration, prepared.menu, options.workers, watch, STAGE, again=again, all_kept=True
        )  # fmt: skip
        for surgeon in prepared.menu.surgeons:
            find_removals(calibration, found, STAGE, watch)
            found = with_removals(calibration, found, surgeon, STAGE)
        return _measured(prepared, calibration, found, watch, command)


def _over_seeds(runs: Sequence[Comparison]) -> Comparison:
    """Runs that differ in the seed alone, as one: means, and how far the seeds lie apart."""
    loss = runs[0].loss
    least = [min(method.metrics[loss] for method in run.methods) for run in runs]
    methods = []
    for same in zip(*(run.methods for run in runs), strict=True):
        sites: Counter[str] = Counter()
        for method in same:
            sites.update(method.sites)
        methods.append(
            Method(
                technique=same[0].technique,
                bytes=max(method.bytes for method in same),
                bpw=statistics.fmean(method.bpw for method in same),
                predicted=statistics.fmean(method.predicted for method in same),
                metrics={n: statistics.fmean(m.metrics[n] for m in same) for n in same[0].metrics},
                seconds=round(statistics.fmean(method.seconds for method in same), 2),
                sites=dict(sites.most_common()),
                spread={n: _half_range([m.metrics[n] for m in same]) for n in same[0].metrics},
                best_at=sum(m.metrics[loss] == best for m, best in zip(same, least, strict=True)),
            )
        )
    return replace(
        runs[0],
        seeds=tuple(seed for run in runs for seed in run.seeds),
        dense={n: statistics.fmean(run.dense[n] for run in runs) for n in runs[0].dense},
        methods=tuple(methods),
        seconds={stage: round(sum(run.seconds[stage] for run in runs), 2) for stage in runs[0].seconds},
    )


def _half_range(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / 2


def check(options: Options) -> None:
    """What can be refused from headers and words alone."""
    if len(options.techniques) < 2 and not options.allocators:
        raise InputError("compare needs at least two techniques; write --techniques rtn,gptq, or leave it out")
    for option, named in (("techniques", options.techniques), ("allocators", options.allocators)):
        twice = [t for t, count in Counter(named).items() if count > 1]
        if twice:
            raise InputError(f"--{option} names {twice[0]!r} twice; name each {option.removesuffix('s')} once")
    if options.budget is None:
        raise InputError("compare needs a --budget, such as 4bpw, 12MB or 25%")
    budget = parse_budget(options.budget)
    alone = [technique for technique in options.techniques if not surgery(technique)]
    menus = {technique: make_menu((technique,), "float16") for technique in alone}
    if options.allocators:
        menus = {", ".join(alone) or "the default technique": make_menu(tuple(alone), "float16")}
    for technique, reason in beyond(options, budget, menus).items():
        raise InputError(f"{technique}: {reason}")


def beyond(options: Options, budget: Budget, menus: Mapping[str, Menu]) -> dict[str, str]:
    """Of the named menus those that cannot reach the budget, and why, from the checkpoint's headers."""
    network = open_network(options.model, options.dtype)
    found: dict[str, str] = {}
    for name, menu in menus.items():
        try:
            check_budget(budget, network, reachable(network, menu, {}))
        except InputError as reason:
            found[name] = str(reason)
    return found


def _measured(
    prepared: Prepared, calibration: Calibration, found: Candidates, watch: Stopwatch, command: str
) -> Comparison:
    options, network = prepared.options, prepared.network
    assert prepared.budget is not None
    size = prepared.budget.bytes(network.tree.parameters, network.checkpoint.safetensors_bytes)
    dtype = str(network.plain_dtype).removeprefix("torch.")
    alone = [t for t in options.techniques if not surgery(t)]  # taking blocks out is part of the joint plan only
    offered = {t: shortlist(found, make_menu((t,), dtype)) for t in alone} | {TOGETHER: found}
    planners: dict[str, Allocator] = dict.fromkeys(offered, Pareto())
    if options.allocators:
        offered = dict.fromkeys(options.allocators, found)
        planners = {text: parse_allocator(text) for text in options.allocators}
    plans, chosen, weights = {}, {}, {}
    with watch.stage("plan", len(offered)) as advance:
        for technique, own in offered.items():
            measures = NetworkMeasures(calibration, own, STAGE, watch)
            try:
                plans[technique] = planners[technique].allocate(own.tree(), size - prepared.range.fixed, measures)
            except InputError as reason:
                raise InputError(f"{technique}: {reason}") from None
            advance()
    again = refit if keeps_statistics(options, network) else refit_by_pass
    for technique, allocation in plans.items():
        chosen[technique] = {name: c.recipe for name, c in allocation.sites.items()}
        written = again(calibration, found, chosen[technique], options.workers, watch)
        weights[technique] = overlay(written, chosen[technique])
    metrics = _quality(prepared, calibration, weights, watch)
    methods = []
    for technique, allocation in plans.items():
        made = rebuilt(found, chosen[technique])
        written_bytes = predicted_bytes(made.network, made.recipes)
        methods.append(
            Method(
                technique=technique,
                bytes=written_bytes,
                bpw=8 * written_bytes / network.tree.parameters,
                predicted=allocation.damage,
                metrics=metrics[technique],
                seconds=round(seconds_spent(calibration, offered[technique], STAGE), 2),
                sites=_counted(chosen[technique]),
            )
        )
    evaluation = prepared.evaluation
    return Comparison(
        seeds=(options.seed,),
        network=network.name,
        budget=size,
        asked=str(prepared.budget),
        loss=prepared.loss.name,
        unit=prepared.loss.unit,
        data=Path(evaluation.text.source).name + (", same source" if evaluation.same_source else ""),
        dense=metrics["dense"],
        methods=tuple(methods),
        seconds={name: round(seconds, 2) for name, seconds in watch.seconds.items()},
        versions=versions(),
        command=command,
    )


def _quality(
    prepared: Prepared, calibration: Calibration, weights: dict[str, Overlay], watch: Stopwatch
) -> dict[str, dict[str, float]]:
    """Metrics of every plan and of the dense network, in one pass over the held-out text."""
    network = prepared.network
    with watch.stage("evaluate", (1 + len(weights)) * len(network.tree.blocks)) as advance:
        found = compare(
            network, weights, prepared.loss, prepared.evaluation.batches, calibration.folder,
            prepared.options.device, advance,
        )  # fmt: skip
    return {name: measured.metrics for name, measured in found.items()}


def _counted(recipes: dict[str, str]) -> dict[str, int]:
    """Technique -> sites; a rewrite counts as part of the chain, ``awq+rtn``."""
    names = ["+".join(part.partition(":")[0] for part in recipe.split("+")) for recipe in recipes.values()]
    return dict(Counter(names).most_common())
