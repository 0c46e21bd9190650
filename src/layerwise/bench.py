"""The act *bench*: measure a technique against its baseline at equal bytes, over calibration seeds.

How a technique is measured follows from its role, so a new technique needs nothing here:

    encoder     uniform on all linears, against round to nearest on the same grid; where the sizes differ, against the
                smallest uniform round to nearest that is at least as large, and against round to nearest planned
                within the setting's bytes
    rewrite     the rewrite and then round to nearest, against round to nearest alone
    allocator   its plan in the bytes of a uniform setting, against that setting and against our own planner, all over
                the same candidates

Tables are stored as 8-bit rows on both sides, so what differs is the linears. Both sides are encoded on the same
tokens and measured in one pass over the same held-out text.
"""

from __future__ import annotations

import os
import shlex
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from layerwise.apply import predicted_bytes
from layerwise.calibrate.passes import Calibration, forward
from layerwise.candidates import find_candidates
from layerwise.compress import start
from layerwise.disk import keeps_statistics
from layerwise.encoding.encoded import layout_bytes
from layerwise.engine.machine import versions
from layerwise.engine.progress import Progress, Stopwatch
from layerwise.errors import InputError
from layerwise.evaluate.compare import compare
from layerwise.evidence.rows import Baseline, Evidence, Row
from layerwise.kept import Candidates, SiteCandidates, overlay, size_range
from layerwise.network.network import Network
from layerwise.network.overlay import Overlay
from layerwise.plan.candidates import layout_of
from layerwise.plan.constraints import is_dense
from layerwise.plan.menu import Menu, fitted, make_menu, uniform_recipes
from layerwise.plan.pareto import Pareto
from layerwise.plan.tree import Allocation
from layerwise.prepare import Options, Prepared
from layerwise.refit import refit, refit_by_pass
from layerwise.rewriting import encoder_of
from layerwise.shortlist import shortlist
from layerwise.technique import Allocator, Technique, find, parse_recipe, parse_technique

FLOOR = "rtn"  # what every encoder is held against
WIDTHS = (4, 3, 2)
GROUP = 64
TABLES = "int8"
STAGE = "bench"
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"  # in a source checkout


@dataclass(frozen=True)
class Bench:
    """What is measured, and on what. The network and texts are the committed example unless they are given."""

    technique: str  # a name, or a name with options, for that setting alone
    network: str | None = None
    calibrate: str | None = None
    evaluate: str | None = None
    seeds: tuple[int, ...] = (0, 1)
    sequences: int = 32
    length: int = 128
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)

    def command(self) -> str:
        """The command line that measures this again."""
        words = ["layerwise", "bench", self.technique]
        for option in ("network", "calibrate", "evaluate", "seeds", "sequences", "length"):
            value, usual = getattr(self, option), next(f.default for f in fields(self) if f.name == option)
            if value != usual or option == "seeds":
                words += [f"--{option}", ",".join(map(str, value)) if option == "seeds" else str(value)]
        return shlex.join(words)

    def options(self, seed: int, work: Path) -> Options:
        """The run of one seed. One thread, because threads order the sums and so decide the last digits."""
        if self.network is None:
            network, calibrate, evaluate = _example()
        else:
            network, calibrate, evaluate = self.network, self.calibrate or "", self.evaluate or ""
        return Options(
            model=network, calibrate=calibrate, evaluate=evaluate, sequences=self.sequences, length=self.length,
            seed=seed, threads=1, workers=self.workers, work=str(work),
        )  # fmt: skip


@dataclass(frozen=True)
class Side:
    """One of two networks that are held against each other; equal names are equal networks."""

    recipe: str
    bytes: int
    weights: Overlay


@dataclass(frozen=True)
class Trial:
    """A setting of the technique and its baseline."""

    setting: Side
    baseline: Side


@dataclass(frozen=True)
class Ground:
    """A calibrated network of one seed, on which any role can encode and plan."""

    prepared: Prepared
    calibration: Calibration
    watch: Stopwatch

    @property
    def network(self) -> Network:
        return self.prepared.network

    def search(self, linears: Sequence[str]) -> Candidates:
        """Encode these recipes at every linear, tables as 8-bit rows; one reverse pass."""
        options = self.prepared.options
        table = str(parse_recipe(uniform_recipes(parse_recipe(FLOOR), TABLES)[1]))
        menu = Menu(tuple(dict.fromkeys(str(parse_recipe(r)) for r in linears)), (table,))
        again = keeps_statistics(options, self.network)
        return find_candidates(self.calibration, menu, options.workers, self.watch, STAGE, again=again, all_kept=True)

    def uniform(self, found: Candidates, recipe: str) -> Side:
        """One recipe on every linear."""
        wanted = str(parse_recipe(recipe))
        return self.side(found, recipe, {name: _settled(site, wanted) for name, site in found.sites.items()})

    def planned(self, found: Candidates, name: str, allocation: Allocation) -> Side:
        return self.side(found, name, {site: c.recipe for site, c in allocation.sites.items()})

    def side(self, found: Candidates, name: str, recipes: dict[str, str]) -> Side:
        """These recipes as the product stores them: encoded again on fit and judge tokens together."""
        again = refit if keeps_statistics(self.prepared.options, self.network) else refit_by_pass
        written = again(self.calibration, found, recipes, self.prepared.options.workers, self.watch)
        return Side(name, predicted_bytes(self.network, recipes), overlay(written, recipes))


def _settled(site: SiteCandidates, wanted: str) -> str:
    """The recipe of a uniform setting at one site, or what is stored there whatever the setting."""
    offered = [c.recipe for c in site.candidates]
    for recipe in (fitted(wanted, site.site.columns), fitted(encoder_of(wanted), site.site.columns)):
        if recipe in offered:
            return recipe
    return offered[0]


# ---------------------------------------------------------------- one function a role


def encoder_trials(ground: Ground, technique: str) -> list[Trial]:
    """Each setting on every linear, against round to nearest in as many bytes."""
    settings = settings_of(technique)
    floor = floor_settings()
    rivals = {setting: rival_of(ground, setting, floor) for setting in settings}
    unequal = {s for s, r in rivals.items() if not r or len({bytes_of_linears(ground.network, x) for x in (s, r)}) > 1}
    found = ground.search([*settings, *filter(None, rivals.values()), *(floor_menu() if unequal else ())])
    trials = []
    for setting, rival in rivals.items():
        mine = ground.uniform(found, setting)
        if rival is not None:
            trials.append(Trial(mine, ground.uniform(found, rival)))
        if setting in unequal:
            trials.append(Trial(mine, planned_floor(ground, found, mine.bytes)))
    return trials


def floor_settings() -> list[str]:
    """Uniform settings of round to nearest, fine enough in size that one lies close above every setting."""
    made = [f"{FLOOR}:bits={bits},group={group}" for bits in range(2, 9) for group in (0, 256, 128, 64, 32, 16)]
    return [str(parse_recipe(recipe)) for recipe in made]


def floor_menu() -> tuple[str, ...]:
    """The recipes that round to nearest is planned over."""
    return tuple(recipe for recipe in make_menu((FLOOR,), "float16").linear if not is_dense(recipe))


def rival_of(ground: Ground, setting: str, floor: Sequence[str]) -> str | None:
    """The smallest uniform round to nearest that is at least as large, on the same grid if it can be.

    None where there is none, and for round to nearest itself.
    """
    encoder = parse_recipe(setting).encoder
    if encoder.name == FLOOR:
        return None
    twin = str(parse_recipe(uniform_recipes(parse_recipe(setting), "same")[1]))
    sizes = {recipe: bytes_of_linears(ground.network, recipe) for recipe in floor}
    wanted = bytes_of_linears(ground.network, setting)
    if sizes.get(twin) == wanted:
        return twin
    return min((r for r in sizes if sizes[r] >= wanted), key=lambda r: sizes[r], default=None)


def bytes_of_linears(network: Network, recipe: str) -> int:
    """Payload of a uniform setting, from shapes alone."""
    linears = [s for s in network.tree.sites if s.kind == "linear"]
    return sum(layout_bytes(layout_of(fitted(recipe, s.columns), s.rows, s.columns)) for s in linears)


def planned_floor(ground: Ground, found: Candidates, size: int) -> Side:
    """Round to nearest with widths and groups planned within ``size`` bytes of the file."""
    rest = [site for site in found.sites.values() if site.site.kind != "linear"]
    tables = tuple(dict.fromkeys(c.recipe for site in rest for c in site.candidates))
    tree = shortlist(found, Menu(floor_menu(), tables)).tree()
    allocation = Pareto().allocate(tree, max(size - ground.prepared.range.fixed, size_range(tree)[0]))
    return ground.planned(found, f"{FLOOR}, planned within {size} bytes", allocation)


def rewrite_trials(ground: Ground, technique: str) -> list[Trial]:
    """The rewrite before round to nearest, against round to nearest alone, on the same grids."""
    plain = [f"{FLOOR}:bits={bits},group={GROUP}" for bits in WIDTHS]
    rewritten = [f"{parse_technique(technique)}+{recipe}" for recipe in plain]
    found = ground.search([*rewritten, *plain])
    return [
        Trial(ground.uniform(found, mine), ground.uniform(found, other))
        for mine, other in zip(rewritten, plain, strict=True)
    ]


def allocator_trials(ground: Ground, technique: str) -> list[Trial]:
    """The allocator's plan in a uniform setting's bytes, against that setting and against the product's planner."""
    allocator = parse_technique(technique)
    assert isinstance(allocator, Allocator)
    linears = floor_menu()
    found = ground.search(linears)
    tree, trials = found.tree(), []
    for bits in WIDTHS:
        widest = [r for r in linears if r.startswith(f"{FLOOR}:bits={bits},")][-1]
        uniform = ground.uniform(found, widest)
        budget = max(uniform.bytes - ground.prepared.range.fixed, size_range(tree)[0])
        mine = ground.planned(found, f"{allocator} over {FLOOR}, {bits} bits", allocator.allocate(tree, budget))
        trials.append(Trial(mine, uniform))
        if not isinstance(allocator, Pareto):
            ours = ground.planned(found, f"pareto over {FLOOR}, {bits} bits", Pareto().allocate(tree, budget))
            trials.append(Trial(mine, ours))
    return trials


ROLES: dict[str, Callable[[Ground, str], list[Trial]]] = {
    "encoder": encoder_trials,
    "rewrite": rewrite_trials,
    "allocator": allocator_trials,
}
"""Role -> how a technique of that role is measured; a role without an entry is refused by name."""


def settings_of(technique: str) -> list[str]:
    """The settings of an encoder that are measured: what was asked for, its own menu, or 4, 3 and 2 bits."""
    name, _, options = technique.partition(":")
    encoder = find(name)
    if options:
        return [str(parse_technique(technique))]
    if encoder.menu:
        return [f"{encoder.name}:{setting}" for setting in encoder.menu]
    known = {f.name for f in fields(encoder)}  # type: ignore[arg-type]
    group = f",group={GROUP}" if "group" in known else ""
    return [f"{encoder.name}:bits={bits}{group}" for bits in WIDTHS] if "bits" in known else [encoder.name]


# ---------------------------------------------------------------- the act


def bench(asked: Bench, progress: Progress | None = None) -> Evidence:
    """Measure a technique's evidence rows.

    Raises ``InputError`` before any work for an unknown technique, a role that cannot be measured, or missing text.
    """
    technique = check(asked)
    values: dict[int, list[tuple[Trial, float, float]]] = {}  # trial -> (trial, its value, the baseline's), by seed
    network = metric = data = ""
    for seed in asked.seeds:
        with ground_of(asked, seed, progress) as ground:
            trials = ROLES[technique.role](ground, asked.technique)
            scores = measured(ground, trials)
            prepared = ground.prepared
            network, metric = ground.network.name, prepared.loss.name
            data = (
                f"calibrated on {_short(prepared.calibration_text.source)}, "
                f"measured on {_short(prepared.evaluation.text.source)}"
            )
            for place, (trial, (mine, other)) in enumerate(zip(trials, scores, strict=True)):
                values.setdefault(place, []).append((trial, mine, other))
    made, command = versions(), asked.command()
    rows = tuple(
        Row(
            network=network,
            data=data,
            metric=metric,
            setting=found[0][0].setting.recipe,
            bytes=max(trial.setting.bytes for trial, _, _ in found),
            value=_figure(statistics.fmean(mine for _, mine, _ in found)),
            baseline=Baseline(
                found[0][0].baseline.recipe,
                max(trial.baseline.bytes for trial, _, _ in found),
                _figure(statistics.fmean(other for _, _, other in found)),
            ),
            seeds=asked.seeds,
            spread=_figure((max(mine for _, mine, _ in found) - min(mine for _, mine, _ in found)) / 2),
            versions=made,
            command=command,
        )
        for found in values.values()
    )
    return Evidence(technique.name, technique.paper, rows)


def read_seeds(text: str) -> tuple[int, ...]:
    """``0,1,2`` -> seeds."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words) or len(set(map(int, words))) < len(words):
        raise InputError(f"--seeds must be different whole numbers, such as 0,1, not {text!r}")
    return tuple(map(int, words))


def check(asked: Bench) -> type[Technique]:
    """The technique's class, once everything that can be checked without a network has been."""
    if "+" in asked.technique:
        raise InputError(
            f"{asked.technique} is a recipe, and bench measures one technique; use layerwise compare for it"
        )
    technique = find(asked.technique.partition(":")[0])
    parse_technique(asked.technique)
    if technique.role not in ROLES:
        article = "an" if technique.role[0] in "aeiou" else "a"
        raise InputError(
            f"{technique.name} is {article} {technique.role}, which bench cannot measure; "
            f"it measures techniques of the roles {', '.join(ROLES)}"
        )
    given = [asked.network, asked.calibrate, asked.evaluate]
    if any(given) and not all(given):
        raise InputError("give --network, --calibrate and --evaluate together, or none of them for the example network")
    if not any(given):
        _example()
    return technique


def _example() -> tuple[str, str, str]:
    """Network, calibration text and held-out text of the repository's examples."""
    found = tuple(EXAMPLES / name for name in ("docs-lm", "docs_calibrate.txt", "docs_heldout.txt"))
    if not all(path.exists() for path in found):
        raise InputError(
            "the example network is part of a source checkout, which this is not; "
            "give --network DIR --calibrate TEXT --evaluate TEXT"
        )
    return str(found[0]), str(found[1]), str(found[2])


@contextmanager
def ground_of(asked: Bench, seed: int, progress: Progress | None) -> Iterator[Ground]:
    """Open, check, and run the forward pass, in a work folder that is removed afterwards."""
    watch = Stopwatch(progress)
    with tempfile.TemporaryDirectory(prefix="layerwise-") as folder:
        prepared, calibration, _ = start(asked.options(seed, Path(folder) / "work"), watch)
        try:
            calibration = replace(calibration, whole_inputs=True)  # whatever the technique, one set of statistics
            forward(calibration, watch)
            yield Ground(prepared, calibration, watch)
        finally:
            calibration.journal.close()


def measured(ground: Ground, trials: Sequence[Trial]) -> list[tuple[float, float]]:
    """(loss of the setting, loss of the baseline) of every trial, in one pass over the held-out text."""
    prepared = ground.prepared
    sides = [side for trial in trials for side in (trial.setting, trial.baseline)]
    variants = {f"stored as {side.recipe}": side.weights for side in sides}  # ``dense`` is the network itself
    with ground.watch.stage("evaluate", (1 + len(variants)) * len(ground.network.tree.blocks)) as advance:
        found = compare(
            ground.network, variants, prepared.loss, prepared.evaluation.batches, ground.calibration.folder,
            prepared.options.device, advance,
        )  # fmt: skip
    loss = {side.recipe: found[f"stored as {side.recipe}"].metrics[prepared.loss.name] for side in sides}
    return [(loss[trial.setting.recipe], loss[trial.baseline.recipe]) for trial in trials]


def _short(source: str) -> str:
    return Path(source).name


def _figure(value: float) -> float:
    """Five digits: more than a calibration seed leaves standing."""
    return float(f"{value:.5g}")
