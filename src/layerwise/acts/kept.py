"""What a finished search left in the work folder: each site's candidates, and where their encodings lie.

A plan picks among them in seconds, for any budget, without touching the network again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from layerwise.acts.rewriting import AS_IS, chain_of, kept_values, suffix_of
from layerwise.calibrate.passes import Calibration
from layerwise.encoding.encoded import Encoded
from layerwise.encoding.forms import restore_form
from layerwise.network.network import Network
from layerwise.network.overlay import Overlay
from layerwise.network.reblocked import new_name, reblocked
from layerwise.network.safetensors_file import read, read_header
from layerwise.network.sites import Site
from layerwise.network.sizes import plain_bytes, plain_of_block
from layerwise.plan.menu import fitted
from layerwise.plan.tree import Candidate, Choice, Leaf, Node, Sum
from layerwise.recipe import parse_technique, surgery
from layerwise.roles import BlockMeasure


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one candidate's stored form lies in the work folder, and the spec that restores it."""

    file: Path
    place: int
    spec: dict[str, Any]

    def read(self) -> Encoded:
        mine = {k: i for k, i in read_header(self.file)[0].items() if k.startswith(f"{self.place}/")}
        tensors = {k.partition("/")[2].removeprefix("weight"): read(i) for k, i in mine.items()}
        return restore_form(self.spec, tensors)


@dataclass(frozen=True)
class SiteCandidates:
    """What the journal knows of a site: its kept candidates, where their encodings lie, and its coverage."""

    site: Site
    candidates: tuple[Candidate, ...]
    stored: tuple[Stored, ...]
    tokens: int
    reached: bool

    def fetch(self, recipe: str) -> Encoded:
        """Read the stored form of one candidate from the work folder."""
        return self.stored[[c.recipe for c in self.candidates].index(recipe)].read()

    def of(self, label: str) -> tuple[Candidate, ...]:
        """The candidates of one alternative of the site's block."""
        return tuple(c for c in self.candidates if chain_of(c.recipe) == label)


@dataclass(frozen=True)
class Candidates:
    """Every site's candidates, in the order of the site tree.

    folder:  where the encodings lie.
    refused: block -> chain of rewrites -> the sentence with which it was refused there.
    removals: what taking a block out costs, where a surgeon may do so.
    """

    network: Network
    sites: dict[str, SiteCandidates]
    folder: Path
    refused: dict[str, dict[str, str]]
    removals: Removals | None = None

    def without_damages(self) -> Candidates:
        """For a uniform setting that was encoded without gradients: nothing is predicted of it."""
        sites = {
            name: replace(found, candidates=tuple(replace(c, damage=0.0) for c in found.candidates))
            for name, found in self.sites.items()
        }
        return replace(self, sites=sites)

    def tree(self) -> Node:
        """The site tree for the solver.

        A block is the sum of its linears, or a choice between such sums where rewrites offer alternatives, or where it
        may be taken out; everything else hangs off the network.
        """
        children: list[Node] = []
        blocks: dict[str, list[SiteCandidates]] = {}
        for name, found in self.sites.items():
            if found.site.block is None:
                children.append(Leaf(name, found.candidates))
            else:
                blocks.setdefault(found.site.block, []).append(found)
        children += [self._block_node(block, members) for block, members in blocks.items()]
        return Sum("network", tuple(children))

    def _block_node(self, block: str, members: Sequence[SiteCandidates]) -> Node:
        node = block_node(block, members)
        if self.removals is None:
            return node
        gone, must_go = self.removals.option(self.network, block)
        if gone is None:
            return node
        kept = node.options if isinstance(node, Choice) else ((AS_IS, node),)
        return Choice(block, ((self.removals.label, gone),) if must_go else (*kept, (self.removals.label, gone)))

    def order(self, recipes: Mapping[str, str]) -> tuple[int, ...]:
        """The blocks that remain under these recipes, in execution order."""
        gone = {self.sites[name].site.block for name, recipe in recipes.items() if surgery(recipe)}
        return tuple(i for i, block in enumerate(self.network.tree.blocks) if block not in gone)

    def plain(self, recipes: Mapping[str, str]) -> dict[str, Tensor]:
        """Parameter -> value, for what the chosen alternatives changed outside the sites: norms and biases."""
        values: dict[str, Tensor] = {}
        for block, label in self.alternatives(recipes).items():
            values |= kept_values(self.folder, block, label, "plain")
        return values

    def alternatives(self, recipes: Mapping[str, str]) -> dict[str, str]:
        """Block -> chain of rewrites, for the blocks that the recipes take rewritten."""
        chosen = {
            found.site.block: chain_of(recipes[name])
            for name, found in self.sites.items()
            if found.site.block and not surgery(recipes[name])
        }
        return {block: label for block, label in chosen.items() if block is not None and label != AS_IS}


@dataclass(frozen=True)
class Removals:
    """What it costs to take each block out, measured on the network and put on the scale of predicted damages."""

    label: str
    scale: float
    blocks: tuple[BlockMeasure, ...]

    def option(self, network: Network, block: str) -> tuple[Node | None, bool]:
        """(the alternative without the block, whether there is no other); None where the block must stay.

        The block's sites store nothing, and its norms and biases go with it: bytes below zero, since a plan's fixed
        part counts them. Its damage is one figure; it is shared out by the size of the sites.
        """
        index = network.tree.blocks.index(block)
        order = parse_technique(self.label).order(self.blocks)  # type: ignore[attr-defined]
        counted = len(order) < len(self.blocks)
        if counted and index in order:
            return None, False
        sites = network.tree.of_block(block)
        whole = sum(site.parameters for site in sites)
        saved, damage = plain_bytes(network, plain_of_block(network, block)), self.blocks[index].damage / self.scale
        leaves = tuple(
            Leaf(s.name, (Candidate(self.label, -saved if i == 0 else 0, damage * s.parameters / whole),))
            for i, s in enumerate(sites)
        )
        return Sum(block, leaves), counted


def block_node(block: str, members: Sequence[SiteCandidates]) -> Node:
    """A block's alternatives: those that have a candidate at each of its sites."""
    labels = dict.fromkeys(chain_of(c.recipe) for found in members for c in found.candidates)
    options = tuple(
        (label, Sum(block, tuple(Leaf(found.site.name, found.of(label)) for found in members)))
        for label in labels
        if all(found.of(label) for found in members)
    )
    return options[0][1] if len(options) == 1 and options[0][0] == AS_IS else Choice(block, options)


def size_range(node: Node) -> tuple[int, int]:
    """Bytes of the smallest and of the largest plan below a node."""
    if isinstance(node, Leaf):
        sizes = [c.bytes for c in node.candidates]
        return min(sizes), max(sizes)
    if isinstance(node, Sum):
        ranges = [size_range(child) for child in node.children]
        return sum(low for low, _ in ranges), sum(high for _, high in ranges)
    ranges = [size_range(option) for _, option in node.options]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def encodings_folder(calibration: Calibration, stage: str) -> Path:
    """Where a stage keeps its encodings."""
    return calibration.folder / re.sub(r"[^A-Za-z0-9_=-]+", "-", stage)


def encodings_file(folder: Path, site: str, label: str) -> Path:
    """Where a stage keeps a site's encodings under one alternative of its block."""
    return folder / f"{site}{suffix_of(label)}.safetensors"


def statistics_file(folder: Path, site: str, label: str) -> Path:
    """Where a stage keeps what encoders saw at a site."""
    return folder / f"{site}{suffix_of(label)}.statistics"


def read_candidates(calibration: Calibration, stage: str = "candidates") -> Candidates:
    """All finished units of the journal, as candidates in the order of the site tree."""
    entries: dict[str, Any] = {}
    refused: dict[str, dict[str, str]] = {}
    for unit in calibration.units():
        entries.update(calibration.journal[f"{stage}/{unit}"])
        refused[unit] = calibration.journal[f"{stage}/{unit}/refused"]
    folder = encodings_folder(calibration, stage)
    shared: dict[str, Any] = {}  # equal recipes and specs of all sites are one object

    def once(value: Any) -> Any:
        return shared.setdefault(json.dumps(value), value)

    sites = {}
    for site in calibration.network.tree.sites:
        if site.name in entries:
            entry = entries[site.name]
            labels = {chain_of(c["recipe"]) for c in entry["candidates"]}
            files = {label: encodings_file(folder, site.name, label) for label in labels}
            sites[site.name] = SiteCandidates(
                site,
                tuple(Candidate(once(c["recipe"]), c["bytes"], c["damage"]) for c in entry["candidates"]),
                tuple(Stored(files[chain_of(c["recipe"])], c["place"], once(c["spec"])) for c in entry["candidates"]),
                entry["tokens"],
                entry["reached"],
            )
    return Candidates(calibration.network, sites, folder, refused)


def with_removals(calibration: Calibration, candidates: Candidates, label: str, stage: str) -> Candidates:
    """The candidates with what the journal knows about taking blocks out."""
    found = calibration.journal[f"{stage}/removals"]
    blocks = tuple(BlockMeasure(b["damage"], b["influence"]) for b in found["blocks"])
    return replace(candidates, removals=Removals(label, found["scale"], blocks))


def all_damages(calibration: Calibration, stage: str = "candidates") -> dict[str, list[Candidate]]:
    """Every candidate that was encoded, the dominated ones too, for reports and comparisons."""
    out: dict[str, list[Candidate]] = {}
    for unit in calibration.units():
        for name, entry in calibration.journal[f"{stage}/{unit}"].items():
            out[name] = [Candidate(c["recipe"], c["bytes"], c["damage"]) for c in entry["dominated"]]
    return out


def seconds_spent(calibration: Calibration, found: Candidates, stage: str = "candidates") -> float:
    """Seconds that a stage took for these candidates, on one core: rewriting the blocks and encoding every site."""
    total, labels = 0.0, {chain_of(c.recipe) for site in found.sites.values() for c in site.candidates}
    for unit in calibration.units():
        rewriting = calibration.journal[f"{stage}/{unit}/seconds"]
        total += sum(seconds for label, seconds in rewriting.items() if label in labels)
        for name, entry in calibration.journal[f"{stage}/{unit}"].items():
            mine = {c.recipe for c in found.sites[name].candidates}
            total += sum(c["seconds"] for c in entry["dominated"] if c["recipe"] in mine)
    return total


Fetches = dict[str, Callable[[], Encoded]]


def fetches(candidates: Candidates, recipes: Mapping[str, str]) -> Fetches:
    """Site -> a function that reads the chosen stored form from the work folder; none for a site that is gone."""
    return {
        name: partial(candidates.sites[name].fetch, recipe) for name, recipe in recipes.items() if not surgery(recipe)
    }


@dataclass(frozen=True)
class Rebuilt:
    """What a plan makes of the network: its blocks, and by their names in it the recipes, forms and changed values."""

    network: Network
    recipes: dict[str, str]
    encoded: Fetches
    plain: dict[str, Tensor]


def rebuilt(candidates: Candidates, recipes: Mapping[str, str]) -> Rebuilt:
    """The network of the blocks that remain under these recipes."""
    dense, order = candidates.network, candidates.order(recipes)
    network = reblocked(dense, order)
    plain, encoded = candidates.plain(recipes), fetches(candidates, recipes)
    remaining = {name: recipes[name] for name in encoded}
    if network is dense:
        return Rebuilt(network, remaining, encoded, plain)
    new = partial(new_name, old=dense.tree.blocks, new=network.tree.blocks, order=order)

    def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for old, value in values.items() if (name := new(old)) is not None}

    return Rebuilt(network, renamed(remaining), renamed(encoded), renamed(plain))


def overlay(candidates: Candidates, recipes: Mapping[str, str]) -> Overlay:
    """The network's weights with every site as its recipe stores it, and what rewrites changed beside the sites."""
    made = rebuilt(candidates, recipes)
    return Overlay(made.network, made.encoded, made.plain)


def uniform_plan(candidates: Candidates, linear: str, table: str) -> dict[str, str]:
    """The recipes of a uniform setting: one for linears, one for tables and heads, the rest as it must be."""
    chosen = {}
    for name, found in candidates.sites.items():
        wanted = fitted(linear if found.site.kind == "linear" else table, found.site.columns)
        recipes = [c.recipe for c in found.candidates]
        chosen[name] = wanted if wanted in recipes else recipes[-1] if len(recipes) == 1 else wanted
    return chosen
