"""The act *candidates*: encode every recipe at every site, in one reverse pass, and journal bytes and damage.

The encodings of candidates that no other beats in both bytes and damage are kept in the work folder; a plan picks
among them in seconds, for any budget, without touching the network again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from layerwise.calibrate.inputs import input_parts
from layerwise.calibrate.passes import Calibration, Part, reverse
from layerwise.calibrate.statistics import SiteStatistics
from layerwise.encoding.encoded import Encoded, Layout, layout_bytes
from layerwise.encoding.forms import restore_form
from layerwise.engine.progress import Progress
from layerwise.engine.workers import each
from layerwise.network.network import Network
from layerwise.network.safetensors_file import header_share, read, read_header, write
from layerwise.network.sites import Site
from layerwise.plan.candidates import Encoding, encode_candidate, non_dominated
from layerwise.plan.menu import UNREACHED, Menu, fitted
from layerwise.plan.tree import Candidate, Leaf, Node, Sum
from layerwise.technique import parse_recipe


@dataclass(frozen=True)
class SiteCandidates:
    """What the journal knows of a site: its kept candidates with the specs of their encodings, and its coverage."""

    site: Site
    candidates: tuple[Candidate, ...]
    specs: tuple[dict[str, Any], ...]
    file: Path
    tokens: int
    reached: bool

    def fetch(self, recipe: str) -> Encoded:
        """Read the stored form of one candidate from the work folder."""
        index = [c.recipe for c in self.candidates].index(recipe)
        mine = {k: i for k, i in read_header(self.file)[0].items() if k.startswith(f"{index}/")}
        tensors = {k.partition("/")[2].removeprefix("weight"): read(i) for k, i in mine.items()}
        return restore_form(self.specs[index], tensors)


@dataclass(frozen=True)
class Candidates:
    """Every site's candidates, in the order of the site tree."""

    network: Network
    sites: dict[str, SiteCandidates]

    def tree(self) -> Node:
        """The site tree for the solver: blocks are sums of their linears, everything else hangs off the network."""
        children: list[Node] = []
        by_block: dict[str, list[Leaf]] = {}
        for name, found in self.sites.items():
            leaf = Leaf(name, found.candidates)
            if found.site.block is None:
                children.append(leaf)
            else:
                if found.site.block not in by_block:
                    by_block[found.site.block] = []
                by_block[found.site.block].append(leaf)
        children += [Sum(block, tuple(leaves)) for block, leaves in by_block.items()]
        return Sum("network", tuple(children))


def find_candidates(
    calibration: Calibration,
    menu: Menu,
    workers: int,
    progress: Progress,
    stage: str = "candidates",
    only: Mapping[str, str] | None = None,
    parts: Callable[[Calibration, set[str]], Iterable[Part]] = reverse,
) -> Candidates:
    """Run the reverse pass, or what is left of it, and encode every candidate.

    stage: name of the journal's units.
    only:  site -> the one recipe to encode there (``--redo``, ``--fix``).
    parts: where statistics come from: ``reverse``, ``reverse_uniform`` or, without gradients, ``input_parts``.
    """
    network, journal = calibration.network, calibration.journal
    finished = {u for u in calibration.units() if journal.has(f"{stage}/{u}")}
    folder = encodings_folder(calibration, stage)
    folder.mkdir(exist_ok=True)
    with progress.stage("reverse pass and encoding" if parts is not input_parts else "baseline", len(calibration.units())) as advance:
        for _ in finished:
            advance()
        for part in parts(calibration, finished):
            recipes = {s.name: recipes_at(s, menu, part.unreached, only or {}, network) for s in sites_of(network, part)}
            journal.record(f"{stage}/{part.unit}", encode_part(network, part, recipes, folder, workers))
            advance()
    return read_candidates(calibration, stage)


def encodings_folder(calibration: Calibration, stage: str) -> Path:
    """Where a stage keeps its encodings."""
    return calibration.folder / re.sub(r"[^A-Za-z0-9_=-]+", "-", stage)


def sites_of(network: Network, part: Part) -> list[Site]:
    """Sites that are encoded in a unit: those it measured, those it found unreached, and the tables' companions."""
    names = set(part.sites) | set(part.unreached)
    with_positions = part.unit == "tables"
    return [s for s in network.tree.sites if s.name in names or (with_positions and s.kind == "position")]


def recipes_at(
    site: Site, menu: Menu, unreached: frozenset[str], only: Mapping[str, str], network: Network
) -> tuple[str, ...]:
    """The recipes tried at a site."""
    if site.kind == "position":
        return (plain_recipe(network),)
    if site.name in only:
        return (only[site.name],)
    if site.name in unreached:
        return (str(parse_recipe(UNREACHED)),)
    return menu.of(site.kind, site.columns)


def plain_recipe(network: Network) -> str:
    """The recipe that keeps a matrix at 16 bits."""
    dtype = str(network.plain_dtype).removeprefix("torch.")
    return str(parse_recipe(f"dense:dtype={dtype}" if dtype != "float16" else "dense"))


def encode_part(
    network: Network, part: Part, recipes: Mapping[str, Sequence[str]], folder: Path, workers: int
) -> dict[str, Any]:
    """Encode a unit's sites, ``workers`` at a time; returns the journal's entry."""
    sites = {s.name: s for s in sites_of(network, part)}
    weights = {name: network.read_site(site) for name, site in sites.items()}
    tasks = [(name, recipe) for name in sites for recipe in recipes[name]]

    def work(task: tuple[str, str]) -> Encoding:
        name, recipe = task
        fit, judge = statistics_at(part, sites[name])
        return encode_candidate(name, weights[name], recipe, fit, judge)

    found: dict[str, list[Encoding]] = {name: [] for name in sites}
    entry: dict[str, Any] = {}
    for (name, _), encoding in zip(tasks, each(work, tasks, workers), strict=True):
        found[name].append(encoding)
        if len(found[name]) == len(recipes[name]):
            entry[name] = keep(sites[name], found.pop(name), part, folder, largest_file(network))
    return entry


def largest_file(network: Network) -> int:
    """A size that no artifact of this network reaches: it bounds the digits of the header's offsets."""
    return 10 ** len(str(4 * network.tree.parameters))


def statistics_at(part: Part, site: Site) -> tuple[SiteStatistics, SiteStatistics]:
    if site.name in part.sites:
        return part.sites[site.name].fit, part.sites[site.name].judge
    nothing_known = SiteStatistics.uninformed(site.rows, site.columns)
    return nothing_known, nothing_known


def keep(site: Site, encodings: list[Encoding], part: Part, folder: Path, below: int) -> dict[str, Any]:
    """Write the encodings that may enter a plan; returns the site's share of the journal's entry."""
    reached = site.name in part.sites
    all_found = [
        Candidate(e.recipe, stored_bytes(site.name, layout(e.encoded), below), e.damage if reached else 0.0) for e in encodings
    ]
    kept = non_dominated(all_found)
    tensors: dict[str, Tensor] = {}
    for place, index in enumerate(kept):
        for suffix, tensor in encodings[index].encoded.tensors().items():
            tensors[f"{place}/weight{suffix}"] = tensor
    file = folder / f"{site.name}.safetensors"
    write(file, {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()}, tensors.__getitem__)
    return {
        "reached": reached,
        "tokens": part.sites[site.name].fit.tokens + part.sites[site.name].judge.tokens if reached else 0,
        "candidates": [
            {
                "recipe": all_found[i].recipe,
                "bytes": all_found[i].bytes,
                "damage": all_found[i].damage,
                "spec": encodings[i].encoded.spec(),
            }
            for i in kept
        ],
        "dominated": [{"recipe": c.recipe, "bytes": c.bytes, "damage": c.damage} for c in all_found],
    }


def layout(encoded: Encoded) -> Layout:
    return {suffix: (t.dtype, tuple(t.shape)) for suffix, t in encoded.tensors().items()}


def stored_bytes(site: str, form: Layout, below: int) -> int:
    """Bytes a site adds to a file of fewer than ``below`` bytes: its tensors and their share of the header."""
    shares = sum(header_share(f"{site}.weight{suffix}", *entry, below) for suffix, entry in form.items())
    return layout_bytes(form) + shares


def read_candidates(calibration: Calibration, stage: str = "candidates") -> Candidates:
    """All finished units of the journal, as candidates in the order of the site tree."""
    entries: dict[str, Any] = {}
    for unit in calibration.units():
        entries.update(calibration.journal[f"{stage}/{unit}"])
    folder = encodings_folder(calibration, stage)
    sites = {}
    for site in calibration.network.tree.sites:
        if site.name in entries:
            entry = entries[site.name]
            sites[site.name] = SiteCandidates(
                site,
                tuple(Candidate(c["recipe"], c["bytes"], c["damage"]) for c in entry["candidates"]),
                tuple(c["spec"] for c in entry["candidates"]),
                folder / f"{site.name}.safetensors",
                entry["tokens"],
                entry["reached"],
            )
    return Candidates(calibration.network, sites)


def all_damages(calibration: Calibration, stage: str = "candidates") -> dict[str, list[Candidate]]:
    """Every candidate that was encoded, the dominated ones too, for reports and comparisons."""
    out: dict[str, list[Candidate]] = {}
    for unit in calibration.units():
        for name, entry in calibration.journal[f"{stage}/{unit}"].items():
            out[name] = [Candidate(c["recipe"], c["bytes"], c["damage"]) for c in entry["dominated"]]
    return out


Fetches = dict[str, Callable[[], Encoded]]


def fetches(candidates: Candidates, recipes: Mapping[str, str]) -> Fetches:
    """Site -> a function that reads the chosen stored form from the work folder."""
    return {
        name: (lambda found=candidates.sites[name], recipe=recipe: found.fetch(recipe))  # type: ignore[misc]
        for name, recipe in recipes.items()
    }


def uniform_plan(candidates: Candidates, linear: str, table: str) -> dict[str, str]:
    """The recipes of a uniform setting: one for linears, one for tables and heads, the rest as it must be."""
    chosen = {}
    for name, found in candidates.sites.items():
        wanted = fitted(linear if found.site.kind == "linear" else table, found.site.columns)
        recipes = [c.recipe for c in found.candidates]
        chosen[name] = wanted if wanted in recipes else recipes[-1] if len(recipes) == 1 else wanted
    return chosen


