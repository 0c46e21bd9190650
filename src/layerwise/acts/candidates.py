"""The act *candidates*: encode every recipe at every site, in one reverse pass, and journal bytes and damage.

The encodings of candidates that no other beats in both bytes and damage are kept in the work folder; a plan picks
among them in seconds, for any budget, without touching the network again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from layerwise.acts.kept import Candidates, encodings_file, encodings_folder, read_candidates, statistics_file
from layerwise.acts.rewriting import (
    AS_IS,
    Alternative,
    Rewriter,
    chain_of,
    chained,
    chains,
    encoder_of,
    keep_alternative,
)
from layerwise.calibrate.inputs import input_parts, reached_input_parts
from layerwise.calibrate.kept import save_statistics
from layerwise.calibrate.passes import Calibration, Fitted, Part, reverse
from layerwise.calibrate.shared import SharedInputs
from layerwise.calibrate.statistics import SiteStatistics, merged
from layerwise.encoding.encoded import Encoded, Layout, layout_bytes
from layerwise.engine.memory import give_back
from layerwise.engine.progress import Progress
from layerwise.engine.workers import each
from layerwise.errors import InputError
from layerwise.network.network import Network
from layerwise.network.safetensors_file import header_share, write
from layerwise.network.sites import Site
from layerwise.network.sizes import largest_file
from layerwise.plan.candidates import Encoding, encode_candidate, non_dominated, worthwhile
from layerwise.plan.constraints import is_dense
from layerwise.plan.menu import Menu
from layerwise.plan.tree import Candidate
from layerwise.recipe import parse_recipe
from layerwise.sensitivity.kronecker import damage


def find_candidates(
    calibration: Calibration,
    menu: Menu,
    workers: int,
    progress: Progress,
    stage: str = "candidates",
    only: Mapping[str, str] | None = None,
    parts: Callable[[Calibration, set[str]], Iterable[Part]] = reverse,
    again: bool = False,
    all_kept: bool = False,
) -> Candidates:
    """Run the reverse pass, or what is left of it, and encode every candidate.

    stage:      name of the journal's units.
    only:       site -> the one recipe to encode there (``--redo``, ``--fix``).
    parts:      where statistics come from: ``reverse``, ``reverse_uniform`` or, without gradients, ``input_parts``.
    again: keep the statistics of every site, so that the chosen recipes can be encoded again (``layerwise.acts.refit``,
                ``layerwise.acts.sequential``).
    all_kept:   keep the encodings that another beats in bytes and damage too, for comparisons between techniques.

    Raises ``InputError`` for a rewrite that no block of the network has a place for.
    """
    network, journal, only = calibration.network, calibration.journal, only or {}
    needed = ("", "/statistics") if again else ("",)
    finished = {u for u in calibration.units() if all(journal.has(f"{stage}/{u}{n}") for n in needed)}
    folder = encodings_folder(calibration, stage)
    folder.mkdir(exist_ok=True)
    rewriter, asked = Rewriter(calibration), chains([*menu.linear, *only.values()])
    if asked and not finished:
        rewriter.refuse_impossible(asked)
    draft = parts is reverse  # what a plan chooses of these is encoded again
    titles: dict[object, str] = {input_parts: "baseline", reached_input_parts: "forward pass and encoding"}
    title = titles.get(parts, "reverse pass and encoding")
    compared = parts not in titles  # without gradients nothing is predicted
    with progress.stage(title, len(calibration.units())) as advance:
        for _ in finished:
            advance()
        for part in parts(calibration, finished):
            spent: dict[str, float] = {}
            alternatives, refused = alternatives_of(network, part, rewriter, menu, only, spent)
            entry: dict[str, Any] = {}
            for label, alternative in alternatives:
                recipes = {
                    s.name: recipes_at(s, label, menu, part.unreached, only, network, len(alternatives) == 1)
                    for s in sites_of(network, part)
                }
                if alternative is not None:
                    keep_alternative(folder, part.unit, alternative, again)
                encode_alternative(
                    network, part, alternative, recipes, folder, workers, entry, all_kept, draft, compared
                )
                if again:
                    for name, fitted in (alternative or part).sites.items():
                        save_statistics(statistics_file(folder, name, label), merged(fitted.fit, fitted.judge))
            journal.record(f"{stage}/{part.unit}/refused", refused)
            journal.record(f"{stage}/{part.unit}/seconds", spent)
            if again:
                journal.record(f"{stage}/{part.unit}/statistics", None)
            journal.record(f"{stage}/{part.unit}", entry)
            del part, alternatives, alternative  # before the next block is measured
            give_back()
            advance()
    found = read_candidates(calibration, stage)
    refuse_useless(found, chains(menu.linear))
    return found


def alternatives_of(
    network: Network,
    part: Part,
    rewriter: Rewriter,
    menu: Menu,
    only: Mapping[str, str],
    spent: dict[str, float],
) -> tuple[list[tuple[str, Alternative | None]], dict[str, str]]:
    """(the alternatives of a unit by label, None for "as is"; the refusals of the others).

    spent: receives the seconds that each chain of rewrites took.
    """
    if part.unit not in network.tree.blocks:
        return [(AS_IS, None)], {}
    fixed = [only[s.name] for s in sites_of(network, part) if s.name in only]
    accepted: list[tuple[str, Alternative | None]] = []
    refused: dict[str, str] = {}
    for label in chains([*menu.linear, *fixed]):
        began = time.process_time()
        try:
            accepted.append((label, rewriter.alternative(part, label)))
        except InputError as reason:
            if label in chains(fixed):
                raise
            refused[label] = str(reason)
        spent[label] = round(time.process_time() - began, 4)
    # A uniform recipe with a rewrite leaves a block as it is only where the rewrite is refused.
    as_is = not accepted or all(
        recipes_at(s, AS_IS, menu, part.unreached, only, network, False) for s in sites_of(network, part)
    )
    return ([(AS_IS, None)] if as_is else []) + accepted, refused


def refuse_useless(found: Candidates, asked: Iterable[str]) -> None:
    """Raise a rewrite's refusal if every block refused it."""
    blocks = found.network.tree.blocks
    for label in asked:
        refusals = [found.refused.get(block, {}).get(label) for block in blocks]
        if blocks and all(refusals):
            raise InputError(str(refusals[0]))


def sites_of(network: Network, part: Part) -> list[Site]:
    """Sites that are encoded in a unit: those it measured, those it found unreached, and the tables' companions."""
    names = set(part.sites) | set(part.unreached)
    with_positions = part.unit == "tables"
    return [s for s in network.tree.sites if s.name in names or (with_positions and s.kind == "position")]


def recipes_at(
    site: Site,
    label: str,
    menu: Menu,
    unreached: frozenset[str],
    only: Mapping[str, str],
    network: Network,
    no_other: bool,
) -> tuple[str, ...]:
    """The recipes tried at a site under one alternative of its block; none where it cannot take part in it.

    no_other: the block has no other alternative, so what was asked after a rewrite is tried without it.
    """
    if site.kind == "position":
        return (plain_recipe(network),)
    if site.name in only:
        wanted = only[site.name]
        if chain_of(wanted) == label:
            return (wanted,)
        return (chained(label, wanted),) if chain_of(wanted) == AS_IS else ()
    kept = menu.kept(site, network.kept_spec(site))
    if site.name in unreached:
        return tuple(chained(label, recipe) for recipe in kept or menu.unreached(site))
    offered = (*kept, *menu.offered(site))  # first: of two that change nothing, the one that is not encoded again
    if site.block is None:
        return distinct(map(encoder_of, offered))
    mine = tuple(r for r in offered if chain_of(r) == label)
    plain = tuple(r for r in offered if is_dense(r))
    if label != AS_IS:
        return distinct([*mine, *(chained(label, encoder_of(r)) for r in plain)])
    return distinct(map(encoder_of, offered)) if no_other and mine == plain else mine


def distinct(items: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))


def plain_recipe(network: Network) -> str:
    """The recipe that keeps a matrix at 16 bits."""
    dtype = str(network.plain_dtype).removeprefix("torch.")
    return str(parse_recipe(f"dense:dtype={dtype}" if dtype != "float16" else "dense"))


def encode_alternative(
    network: Network,
    part: Part,
    alternative: Alternative | None,
    recipes: Mapping[str, Sequence[str]],
    folder: Path,
    workers: int,
    entry: dict[str, Any],
    all_kept: bool,
    draft: bool,
    compared: bool,
) -> None:
    """Encode a unit's sites under one alternative, ``workers`` at a time, and add them to the journal's entry.

    compared: whether damages are of use beyond the choice between several recipes of a site.
    """
    sites = {s.name: s for s in sites_of(network, part)}
    weights = dict(alternative.weights) if alternative else {}
    measured = alternative.sites if alternative else part.sites
    tasks = [(name, recipe) for name in sites for recipe in recipes[name]]
    shared = SharedInputs(measured[name].fit for name, _ in tasks if name in measured)

    def weight_of(name: str) -> Tensor:
        """A site's matrix, in memory from its first recipe to its last."""
        return weights[name] if name in weights else weights.setdefault(name, network.read_site(sites[name]))

    def work(task: tuple[str, str]) -> Encoding:
        name, recipe = task
        fit, judge = statistics_at(measured, sites[name])
        with shared.of(fit) as fit:
            return encode_candidate(
                name, weight_of(name), recipe, fit, judge, draft, compared or len(recipes[name]) > 1
            )

    wanted = all_places if all_kept else non_dominated
    found: dict[str, list[Encoding]] = {name: [] for name in sites}
    label = alternative.label if alternative else AS_IS
    for (name, _), encoding in zip(tasks, each(work, tasks, workers), strict=True):
        found[name].append(encoding)
        if len(found[name]) == len(recipes[name]):
            file = encodings_file(folder, name, label)
            judged = any(e.damage for e in found[name])
            removed = damage(weight_of(name), statistics_at(measured, sites[name])[1]) if judged else 0.0
            weights.pop(name)
            sound = worthwhile(name, found.pop(name), removed)
            kept = keep(sites[name], sound, part, file, largest_file(network), wanted)
            if name in entry:
                entry[name]["candidates"] += kept["candidates"]
                entry[name]["dominated"] += kept["dominated"]
            else:
                entry[name] = kept


def statistics_at(measured: Mapping[str, Fitted], site: Site) -> tuple[SiteStatistics, SiteStatistics]:
    if site.name in measured:
        return measured[site.name].fit, measured[site.name].judge
    nothing_known = SiteStatistics.uninformed(site.rows, site.columns)
    return nothing_known, nothing_known


def all_places(candidates: Sequence[Candidate]) -> list[int]:
    return list(range(len(candidates)))


def keep(
    site: Site,
    encodings: list[Encoding],
    part: Part,
    file: Path,
    below: int,
    wanted: Callable[[Sequence[Candidate]], list[int]],
) -> dict[str, Any]:
    """Write the encodings that may enter a plan to ``file``; returns the site's share of the journal's entry."""
    reached = site.name in part.sites
    all_found = [
        Candidate(
            e.recipe, stored_bytes(site.name, kept_layout(site, layout(e.encoded)), below), e.damage if reached else 0.0
        )
        for e in encodings
    ]
    kept = wanted(all_found)
    tensors: dict[str, Tensor] = {}
    for place, index in enumerate(kept):
        for suffix, tensor in encodings[index].encoded.tensors().items():
            tensors[f"{place}/weight{suffix}"] = tensor
    write(file, {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()}, tensors.__getitem__)
    return {
        "reached": reached,
        "tokens": part.sites[site.name].fit.tokens + part.sites[site.name].judge.tokens if reached else 0,
        "candidates": [
            {
                "recipe": all_found[i].recipe,
                "bytes": all_found[i].bytes,
                "damage": all_found[i].damage,
                "place": place,
                "spec": encodings[i].encoded.spec(),
            }
            for place, i in enumerate(kept)
        ],
        "dominated": [
            {"recipe": c.recipe, "bytes": c.bytes, "damage": c.damage, "seconds": round(e.seconds, 4)}
            for c, e in zip(all_found, encodings, strict=True)
        ],
    }


def layout(encoded: Encoded) -> Layout:
    return {suffix: (t.dtype, tuple(t.shape)) for suffix, t in encoded.tensors().items()}


def kept_layout(site: Site, form: Layout) -> Layout:
    """A form's layout as the artifact has it: a convolution that stays dense keeps the shape of its own parameter."""
    if site.shape is not None and set(form) == {""} and form[""][0].is_floating_point:
        return {"": (form[""][0], site.shape)}
    return form


def stored_bytes(site: str, form: Layout, below: int) -> int:
    """Bytes a site adds to a file of fewer than ``below`` bytes: its tensors and their share of the header."""
    shares = sum(header_share(f"{site}.weight{suffix}", *entry, below) for suffix, entry in form.items())
    return layout_bytes(form) + shares
