"""The plain baseline: one recipe on every linear, as people quantize today.

An ordinary run is held against the smallest uniform GPTQ setting that is at least as large as the plan, calibrated on
*all* the tokens (it has no damages to judge), its tables rounded to the same grid.
"""

from __future__ import annotations

from dataclasses import dataclass

from layerwise.acts.apply import linear_bytes, predicted_bytes
from layerwise.acts.candidates import find_candidates, plain_recipe
from layerwise.acts.kept import Candidates, overlay, uniform_plan
from layerwise.acts.prepare import Prepared
from layerwise.acts.rewriting import encoder_of
from layerwise.acts.sequential import propagate
from layerwise.acts.wanted import need_gradients
from layerwise.calibrate.inputs import input_parts
from layerwise.calibrate.passes import Calibration, reverse_uniform
from layerwise.engine.progress import Progress
from layerwise.network.network import Network
from layerwise.network.overlay import Overlay
from layerwise.plan.menu import Menu, fitted, uniform_recipes
from layerwise.recipe import parse_recipe

BASELINE = "gptq"
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
GROUPS = (128, 64, 32)


@dataclass(frozen=True)
class Baseline:
    """A uniform setting and the network's weights under it."""

    recipe: str
    bytes: int
    linear_bytes: int
    weights: Overlay


def find_baseline(
    prepared: Prepared, calibration: Calibration, candidates: Candidates, plan_bytes: int, progress: Progress
) -> Baseline | None:
    """Encode the smallest uniform setting that is at least as large as the plan; the largest if none is."""
    network = prepared.network
    sizes = {}
    for bits in WIDTHS:
        for group in GROUPS:
            recipe = str(parse_recipe(f"{BASELINE}:bits={bits},group={group}"))
            sizes[recipe] = predicted_bytes(network, uniform_choice(network, candidates, recipe, "same"))
    larger = {r: b for r, b in sizes.items() if b >= plan_bytes}
    recipe = min(larger, key=lambda r: larger[r]) if larger else max(sizes, key=lambda r: sizes[r])
    return encode_uniform(prepared, calibration, candidates, recipe, "same", progress)


def encode_uniform(
    prepared: Prepared,
    calibration: Calibration,
    candidates: Candidates,
    recipe: str,
    embeddings: str,
    progress: Progress,
) -> Baseline:
    """Encode one uniform setting on all calibration tokens."""
    network = prepared.network
    linear, table = uniform_recipes(parse_recipe(recipe), embeddings)
    found = find_candidates(
        calibration,
        Menu((linear,), (str(parse_recipe(table)),)),
        prepared.options.workers,
        progress,
        f"baseline {recipe} {embeddings}",
        unreached_recipes(candidates),
        reverse_uniform if need_gradients([recipe]) else input_parts,
        prepared.options.sequential,
    )
    chosen = uniform_plan(found, linear, str(parse_recipe(table)))
    if prepared.options.sequential:
        found = propagate(calibration, found, chosen, prepared.splits.all, prepared.options.workers, progress)
    return Baseline(recipe, predicted_bytes(network, chosen), linear_bytes(network, chosen), overlay(found, chosen))


def unreached_recipes(candidates: Candidates) -> dict[str, str]:
    """Sites that the loss does not reach get the same recipe in the baseline as in the plan."""
    sites = candidates.sites.items()
    return {name: encoder_of(found.candidates[0].recipe) for name, found in sites if not found.reached}


def uniform_choice(network: Network, candidates: Candidates, recipe: str, embeddings: str) -> dict[str, str]:
    """Site -> recipe of a uniform setting, before anything of it is encoded."""
    linear, table = uniform_recipes(parse_recipe(recipe), embeddings)
    table, chosen = str(parse_recipe(table)), {}
    fixed = unreached_recipes(candidates)
    for site in network.tree.sites:
        if site.kind == "position":
            chosen[site.name] = plain_recipe(network)
        elif site.name in fixed:
            chosen[site.name] = fixed[site.name]
        else:
            chosen[site.name] = fitted(linear if site.kind == "linear" else table, site.columns)
    return chosen
