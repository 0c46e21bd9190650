"""What ``layerwise bench`` measures for each role: settings of a technique, each beside a baseline.

encoder     uniform on all linears, against round to nearest on the same grid; where the sizes differ, against the
            smallest uniform round to nearest that is at least as large, and against round to nearest planned
            within the setting's bytes
rewrite     the rewrite and then round to nearest, against round to nearest alone
allocator   its plan in the bytes of a uniform setting, against that setting and against our own planner, all over
            the same candidates; a rule with candidates of its own (sparsities) over those
scorer      a plan of the least sum of its scores, in the place of our damage; held against the same
surgeon     round to nearest planned together with the removal of blocks, against planned without, in the same bytes
tuner       uniform round to nearest tuned, against the same untuned
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

from layerwise.acts.apply import predicted_bytes
from layerwise.acts.candidates import find_candidates
from layerwise.acts.disk import keeps_statistics
from layerwise.acts.kept import Candidates, SiteCandidates, overlay, rebuilt, size_range, with_removals
from layerwise.acts.measuring import NetworkMeasures
from layerwise.acts.prepare import Prepared
from layerwise.acts.refit import refit, refit_by_pass
from layerwise.acts.removal import find_removals
from layerwise.acts.rewriting import encoder_of
from layerwise.acts.shortlist import shortlist
from layerwise.acts.tuning import tune
from layerwise.calibrate.passes import Calibration
from layerwise.encoding.encoded import layout_bytes
from layerwise.engine.progress import Stopwatch
from layerwise.network.network import Network
from layerwise.network.overlay import Overlay
from layerwise.plan.candidates import layout_of
from layerwise.plan.constraints import is_dense
from layerwise.plan.measures import Measures
from layerwise.plan.menu import Menu, fitted, make_menu, uniform_recipes
from layerwise.plan.order import least_sum
from layerwise.plan.pareto import Pareto
from layerwise.plan.tree import Allocation, Node
from layerwise.recipe import canonical, parse_recipe, parse_technique, parse_tuner
from layerwise.roles import Allocator
from layerwise.technique import find

FLOOR = "rtn"  # what every encoder is held against
WIDTHS = (4, 3, 2)
GROUP = 64
SPARSITIES = (0.5, 0.6, 0.7)
TABLES = "int8"
STAGE = "bench"


@dataclass(frozen=True)
class Side:
    """One of two networks that are held against each other; equal names are equal networks."""

    recipe: str
    bytes: int
    weights: Overlay | None  # None where what it measured is said beside it


@dataclass(frozen=True)
class Figures:
    """What a trial measured itself: in its own metric, smaller is better, of the setting and of the baseline.

    network: what was measured, where it is not the network of the ground.
    data:    what on, where it is not the ground's text.
    """

    metric: str
    setting: float
    baseline: float
    network: str = field(default="", kw_only=True)
    data: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class Trial:
    """A setting of the technique and its baseline, to be measured by the loss unless ``figures`` are given."""

    setting: Side
    baseline: Side
    figures: Figures | None = None


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
        return self.side(found, recipe, chosen_of(found, recipe))

    def planned(self, found: Candidates, name: str, allocation: Allocation) -> Side:
        return self.side(found, name, {site: c.recipe for site, c in allocation.sites.items()})

    def side(self, found: Candidates, name: str, recipes: dict[str, str]) -> Side:
        """These recipes as the product stores them: encoded again on fit and judge tokens together."""
        written = self.written(found, recipes)
        made = rebuilt(written, recipes)
        return Side(name, predicted_bytes(made.network, made.recipes), overlay(written, recipes))

    def written(self, found: Candidates, recipes: dict[str, str]) -> Candidates:
        again = refit if keeps_statistics(self.prepared.options, self.network) else refit_by_pass
        return again(self.calibration, found, recipes, self.prepared.options.workers, self.watch)


def chosen_of(found: Candidates, recipe: str) -> dict[str, str]:
    """What every site is stored as under a uniform setting."""
    wanted = str(parse_recipe(recipe))
    return {name: _settled(site, wanted) for name, site in found.sites.items()}


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
    if over := getattr(allocator, "over", ()):  # recipes of its own, in the place of round to nearest
        return sparsity_trials(ground, allocator, over)
    return planning_trials(ground, str(allocator), allocator.allocate, isinstance(allocator, Pareto), allocator.menu)


def sparsity_trials(ground: Ground, allocator: Allocator, over: Sequence[str]) -> list[Trial]:
    """Its plan over its own recipes in the bytes of three of them, against these and against our own planner."""
    recipes = [str(parse_recipe(recipe)) for recipe in over]
    found = ground.search(recipes)
    tree, trials = found.tree(), []
    measures = NetworkMeasures(ground.calibration, found, STAGE, ground.watch)
    for share in SPARSITIES:
        at = next(r for r in recipes if getattr(parse_recipe(r).encoder, "sparsity", None) == share)
        uniform = ground.uniform(found, at)
        budget = max(uniform.bytes - ground.prepared.range.fixed, size_range(tree)[0])
        within = f"over {parse_recipe(at).encoder.name} in the bytes of sparsity {share}"
        mine = ground.planned(found, f"{allocator} {within}", allocator.allocate(tree, budget, measures))
        ours = ground.planned(found, f"pareto {within}", Pareto().allocate(tree, budget))
        trials += [Trial(mine, uniform), Trial(mine, ours)]
    return trials


def scorer_trials(ground: Ground, technique: str) -> list[Trial]:
    """The plan of the least sum of the scorer's scores, against what an allocator's plan is held against."""
    scorer = str(parse_technique(technique))

    def allocate(tree: Node, budget: int, measures: Measures) -> Allocation:
        return least_sum(tree, budget, measures.scores(scorer))

    return planning_trials(ground, f"least {scorer}", allocate, False)


def planning_trials(
    ground: Ground,
    name: str,
    allocate: Callable[[Node, int, Measures], Allocation],
    is_ours: bool,
    menu: Sequence[str] = (),
) -> list[Trial]:
    """menu: the recipes that a rule chooses between where round to nearest is not what it is about; every
    other one of them, used everywhere, is held against the rule's plan of as many bytes.
    """
    linears = tuple(menu) or floor_menu()
    found = ground.search(linears)
    tree, trials = found.tree(), []
    measures = NetworkMeasures(ground.calibration, found, STAGE, ground.watch)
    if menu:
        settings = {recipe: f"in the bytes of {recipe}" for recipe in linears[2::2] if not is_dense(recipe)}
    else:
        widest = {bits: [r for r in linears if r.startswith(f"{FLOOR}:bits={bits},")][-1] for bits in WIDTHS}
        settings = {recipe: f"over {FLOOR}, {bits} bits" for bits, recipe in widest.items()}
    for recipe, within in settings.items():
        uniform = ground.uniform(found, recipe)
        budget = max(uniform.bytes - ground.prepared.range.fixed, size_range(tree)[0])
        mine = ground.planned(found, f"{name} {within}", allocate(tree, budget, measures))
        trials.append(Trial(mine, uniform))
        if not is_ours:
            ours = ground.planned(found, f"pareto {within}", Pareto().allocate(tree, budget))
            trials.append(Trial(mine, ours))
    return trials


def tuner_trials(ground: Ground, technique: str) -> list[Trial]:
    """Uniform round to nearest, tuned and as it is."""
    tuner = parse_tuner(technique)
    recipes = [f"{FLOOR}:bits={bits},group={GROUP}" for bits in WIDTHS]
    found, trials = ground.search(recipes), []
    splits = ground.prepared.splits
    for recipe in recipes:
        plain = ground.uniform(found, recipe)
        chosen = {name: _settled(site, str(parse_recipe(recipe))) for name, site in found.sites.items()}
        written = ground.written(found, chosen)
        tuned = tune(ground.calibration, written, chosen, tuner, (*splits.fit, *splits.judge), ground.watch)
        trials.append(Trial(Side(f"{recipe}, then {tuner}", plain.bytes, overlay(tuned, chosen)), plain))
    return trials


def surgeon_trials(ground: Ground, technique: str) -> list[Trial]:
    """Round to nearest planned together with the removal of blocks, and with it forced, against planned without."""
    found = ground.search(floor_menu())
    find_removals(ground.calibration, found, STAGE, ground.watch)
    name = technique.partition(":")[0]
    labels = dict.fromkeys(map(canonical, (technique, f"{name}:count=1")))
    fixed, trials = ground.prepared.range.fixed, []
    for bits in WIDTHS:
        widest = next(r for r in floor_menu() if r.startswith(f"{FLOOR}:bits={bits},"))
        size = ground.uniform(found, widest).bytes
        plain = planned_floor(ground, found, size)
        for label in labels:
            offered = with_removals(ground.calibration, found, label, STAGE)
            tree = offered.tree()
            if size - fixed < size_range(tree)[0]:
                continue
            chosen = {site: c.recipe for site, c in Pareto().allocate(tree, size - fixed).sites.items()}
            side = ground.side(offered, f"{FLOOR} and {label}, planned within {size} bytes", chosen)
            trials.append(Trial(side, plain))
    return trials


ROLES: dict[str, Callable[[Ground, str], list[Trial]]] = {
    "encoder": encoder_trials,
    "rewrite": rewrite_trials,
    "allocator": allocator_trials,
    "scorer": scorer_trials,
    "surgeon": surgeon_trials,
    "tuner": tuner_trials,
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
