"""``plan.json``: what was chosen at each site, readable, editable and re-appliable.

    {"format": "layerwise-plan", "version": 1,
     "network":   {"name": …, "fingerprint": …, "parameters": dense parameters},
     "activations": "token_int:bits=8",   (only where inputs of linears are quantized)
     "target":    "vllm",                 (only where the plan is for an engine, see ``targets``)
     "budget":    {"asked": "4.5bpw", "bytes": 12345},
     "predicted": {"bytes": exact size of the file, "damage": …, "loss": the damage's unit},
     "blocks":    {block: label of the alternative},
     "sites":     {site: {"recipe": …, "bytes": …, "damage": …, "bpw": …, "parameters": …,
                          "next_better":  {"recipe": …, "bytes": difference, "damage": difference} or null,
                          "next_cheaper": …}}}

To change a plan, edit a ``recipe``: everything else is recomputed from the candidates when the plan is applied.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerwise.errors import InputError, nearest
from layerwise.plan.neighbours import Step, all_neighbours
from layerwise.plan.reading import MANY, Reader, read_json
from layerwise.plan.targets import find_target
from layerwise.plan.tree import Allocation, Candidate, Choice, Leaf, Node, Sum
from layerwise.recipe import canonical, parse_activations, surgery

FORMAT = "layerwise-plan"
VERSION = 1


@dataclass(frozen=True)
class PlanNetwork:
    name: str
    fingerprint: str
    parameters: int


@dataclass(frozen=True)
class PlanBudget:
    """As it was asked for, and in bytes."""

    asked: str
    bytes: int


@dataclass(frozen=True)
class Predicted:
    """bytes: exact size of the weights file; damage: rise of the loss, in the unit that ``loss`` names."""

    bytes: int
    damage: float
    loss: str


@dataclass(frozen=True)
class PlanSite:
    recipe: str
    bytes: int
    damage: float
    bpw: float
    parameters: int
    next_better: Step | None = None
    next_cheaper: Step | None = None


@dataclass(frozen=True)
class PlanFile:
    network: PlanNetwork
    budget: PlanBudget
    predicted: Predicted
    blocks: dict[str, str]
    sites: dict[str, PlanSite]
    activations: str | None = None
    target: str | None = None

    def check_against(self, sites: Iterable[str]) -> None:
        """Raise ``InputError`` unless the plan names exactly these sites."""
        known = list(sites)
        for site in self.sites:
            if site not in known:
                raise InputError(f"the plan names site {site!r}, which the network does not have{nearest(site, known)}")
        missing = [site for site in known if site not in self.sites]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InputError(f"the plan leaves out site {missing[0]!r}{more}; every site needs a recipe")

    def choose(self, tree: Node) -> Allocation:
        """The candidates that this plan names, as the tree knows them now: this is how an edited plan is re-read."""
        alternatives: dict[str, str] = {}
        chosen_leaves = list(self._reached(tree, alternatives))
        for block in self.blocks:
            if block not in alternatives:
                raise InputError(f"the plan names block {block!r}, which has no alternatives in this network")
        self.check_against(leaf.name for leaf in chosen_leaves)
        return Allocation(
            {leaf.name: _named(leaf, self.sites[leaf.name].recipe) for leaf in chosen_leaves}, alternatives
        )

    def _reached(self, node: Node, alternatives: dict[str, str]) -> Iterable[Leaf]:
        if isinstance(node, Leaf):
            yield node
        elif isinstance(node, Sum):
            for child in node.children:
                yield from self._reached(child, alternatives)
        else:
            yield from self._reached(self._option(node, alternatives), alternatives)

    def _option(self, node: Choice, alternatives: dict[str, str]) -> Node:
        options = dict(node.options)
        label = self.blocks.get(node.name)
        if label not in options:
            asked = f"has no alternative {label!r}" if label is not None else "has no entry in the plan"
            raise InputError(f"block {node.name!r} {asked}; it offers {', '.join(options)}")
        alternatives[node.name] = label
        return options[label]


def make_plan(
    tree: Node,
    allocation: Allocation,
    network: PlanNetwork,
    budget: PlanBudget,
    predicted: Predicted,
    parameters: Mapping[str, int],
    activations: str | None = None,
    target: str | None = None,
) -> PlanFile:
    """The plan file of an allocation; ``parameters`` are the weights of each site, the last two the run's settings."""
    around = all_neighbours(tree, allocation)
    sites = {
        name: PlanSite(
            c.recipe,
            c.bytes,
            c.damage,
            round(8 * c.bytes / parameters[name], 4),
            parameters[name],
            around[name].better,
            around[name].cheaper,
        )
        for name, c in allocation.sites.items()
    }
    return PlanFile(network, budget, predicted, dict(allocation.choices), sites, activations, target)


def write_plan(path: str | os.PathLike[str], plan: PlanFile) -> None:
    """Write the plan, one site a line; the file appears by one rename."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(plan_text(plan), encoding="utf-8")
    os.replace(partial, path)


def plan_text(plan: PlanFile) -> str:
    head = {"format": FORMAT, "version": VERSION}
    parts = {**head, **{key: asdict(getattr(plan, key)) for key in ("network", "budget", "predicted")}}
    if plan.activations is not None:
        parts["activations"] = plan.activations
    if plan.target is not None:
        parts["target"] = plan.target
    lines = [f" {_json(key)}: {_json(value)}," for key, value in parts.items()]
    lines.append(f' "blocks": {_lines({k: _json(v) for k, v in plan.blocks.items()})},')
    lines.append(f' "sites": {_lines({k: _json(asdict(v)) for k, v in plan.sites.items()})}')
    return "{\n" + "\n".join(lines) + "\n}\n"


def read_plan(path: str | os.PathLike[str]) -> PlanFile:
    """Read and check a plan, edited by hand or not; raises ``InputError`` that names the entry that is wrong."""
    top = Reader(read_json(Path(path), "plan"), "the plan")
    if top.text("format") != FORMAT:
        raise InputError(f"{os.fspath(path)!r} is not a layerwise plan; its format should be {FORMAT!r}")
    version = top.whole("version", 1)
    if version > VERSION:
        raise InputError(
            f"the plan has version {version}, this layerwise reads up to {VERSION}; install a newer layerwise"
        )
    top.only("format", "version", "network", "budget", "predicted", "blocks", "sites", "activations", "target")
    network, budget, predicted = top.inner("network"), top.inner("budget"), top.inner("predicted")
    network.only("name", "fingerprint", "parameters")
    budget.only("asked", "bytes")
    predicted.only("bytes", "damage", "loss")
    blocks, sites = top.inner("blocks"), top.inner("sites")
    recipes: dict[str, str] = {}
    return PlanFile(
        PlanNetwork(network.text("name"), network.text("fingerprint"), network.whole("parameters", 1)),
        PlanBudget(budget.text("asked"), budget.whole("bytes", 0)),
        Predicted(predicted.whole("bytes", 0), predicted.number("damage", 0.0), predicted.text("loss")),
        {block: blocks.text(block) for block in blocks.value},
        {site: _site(sites.inner(site), recipes) for site in sites.value},
        _activations(top) if "activations" in top.value else None,
        _target(top) if "target" in top.value else None,
    )


def _activations(top: Reader) -> str:
    try:
        return str(parse_activations(top.text("activations")))
    except InputError as error:
        raise InputError(f"the plan has an impossible setting of activations: {error}") from None


def _target(top: Reader) -> str:
    found = find_target(top.text("target"))
    if found is None:
        raise InputError("the plan's target is no engine; leave it out of a plan for layerwise itself")
    return found.name


def _site(entry: Reader, recipes: dict[str, str]) -> PlanSite:
    entry.only("recipe", "bytes", "damage", "bpw", "parameters", "next_better", "next_cheaper")
    recipe = _recipe(entry, recipes)
    return PlanSite(
        recipe,
        entry.whole("bytes", -MANY if surgery(recipe) else 0),  # a block that is gone takes its norms along
        entry.number("damage", 0.0),
        entry.number("bpw"),
        entry.whole("parameters", 1),
        _step(entry, "next_better", recipes),
        _step(entry, "next_cheaper", recipes),
    )


def _step(entry: Reader, key: str, recipes: dict[str, str]) -> Step | None:
    if entry.value.get(key) is None:
        return None
    step = entry.inner(key)
    step.only("recipe", "bytes", "damage")
    return Step(_recipe(step, recipes), step.whole("bytes", -MANY), step.number("damage"))


def _recipe(entry: Reader, recipes: dict[str, str]) -> str:
    """Canonical text of a recipe; ``recipes`` remembers those already parsed."""
    text = entry.text("recipe")
    if text not in recipes:
        try:
            recipes[text] = canonical(text)
        except InputError as error:
            raise InputError(f"{entry.where} has an impossible recipe: {error}") from None
    return recipes[text]


def _named(leaf: Leaf, recipe: str) -> Candidate:
    for candidate in leaf.candidates:
        if candidate.recipe == recipe:
            return candidate
    offered = ", ".join(c.recipe for c in leaf.candidates)
    raise InputError(f"site {leaf.name!r} has no candidate {recipe!r}; it offers {offered}")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _lines(entries: Mapping[str, str]) -> str:
    if not entries:
        return "{}"
    return "{\n" + ",\n".join(f"  {_json(key)}: {value}" for key, value in entries.items()) + "\n }"
