"""What ``layerwise bench`` measures of a rewrite of a whole network, on modules in memory.

nothing rounded   the largest difference of the rewritten network's outputs in float32, as a share of the largest
                  output, against what storing it in 16 bits does to them
at 4, 3, 2 bits   the network rewritten and then rounded to nearest, against the same without the rewrite, in as many
                  bytes: tables as 8-bit rows, a head of its own on both sides if the rewrite gives it one

In memory, because a rewrite may make a module that no checkpoint of its class can hold. Rounding is given no
statistics, so that calibration has no part in the figures; what a seed draws is the rewrite's own, where it draws.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.encoding.encoded import Layout
from layerwise.errors import InputError
from layerwise.network.artifact import predicted_size
from layerwise.network.load import load
from layerwise.network.network import Network, open_network
from layerwise.network.norms import untie
from layerwise.network.residual import numbers
from layerwise.network.sites import Site, find_sites
from layerwise.network.skeleton import parameter_owners
from layerwise.network.streaming import Batch
from layerwise.plan.candidates import layout_of
from layerwise.plan.menu import fitted, uniform_recipes
from layerwise.recipe import parse_recipe, parse_technique
from layerwise.roles import NetworkRewrite
from layerwise.trials.by_loss import FLOOR, GROUP, TABLES, WIDTHS, Figures, Ground, Side, Trial

EXACTNESS = "largest difference of the outputs"


def accepts(technique: str, path: Path) -> InputError | None:
    """None where the rewrite takes this checkpoint's network, in memory at least; else its refusal."""
    rewrite = parse_technique(technique)
    assert isinstance(rewrite, NetworkRewrite)
    network = open_network(path)
    try:
        rewrite.convert(build_with_weights(network))
    except InputError as refusal:
        return refusal
    return None


def network_rewrite_trials(ground: Ground, technique: str) -> list[Trial]:
    """Exactness, and rounding at three widths, with and without the rewrite."""
    rewrite = parse_technique(technique)
    assert isinstance(rewrite, NetworkRewrite)
    if getattr(rewrite, "seed", None) == 0:
        rewrite = replace(rewrite, seed=ground.prepared.options.seed)  # type: ignore[type-var]
    dense = build_with_weights(ground.network)
    made = rewrite.convert(dense)
    plain = copy.deepcopy(dense)
    untie(plain, given_apart(dense, made))
    label = technique_label(technique)
    trials = [exactness(ground, label, dense, made)]
    recipes = [f"{FLOOR}:bits={bits},group={GROUP}" for bits in WIDTHS]
    stored = [rounded(ground.network, module, recipe) for recipe in recipes for module in (made, plain)]
    losses = losses_of(ground, dense, [module for module, _ in stored])
    for i, recipe in enumerate(recipes):
        (_, mine), (_, other) = stored[2 * i : 2 * i + 2]
        figures = Figures(ground.prepared.loss.name, *losses[2 * i : 2 * i + 2])
        trials.append(Trial(Side(f"{label}, then {recipe}", mine, None), Side(recipe, other, None), figures))
    return trials


def technique_label(technique: str) -> str:
    """The technique as asked for, without the seed that stands for all of them."""
    return str(parse_technique(technique))


def build_with_weights(network: Network) -> nn.Module:
    """The checkpoint's network in memory, float32."""
    return load(network.checkpoint.directory, dtype=torch.float32)


def given_apart(before: nn.Module, after: nn.Module) -> dict[str, str]:
    """Table -> head of every pair that was one parameter and is two."""
    own = {names[0] for names in parameter_owners(after).values()}
    tied = [names for names in parameter_owners(before).values() if len(names) > 1]
    return {names[0]: name for names in tied for name in names[1:] if name in own}


# ---------------------------------------------------------------- without rounding


def exactness(ground: Ground, label: str, dense: nn.Module, made: nn.Module) -> Trial:
    """The rewritten network in float32, and in 16 bits, each against the network as it came."""
    network = ground.network
    halves = copy.deepcopy(made)
    with torch.no_grad():
        for parameter in halves.parameters():
            parameter.copy_(parameter.to(network.plain_dtype).float())
    kind = str(network.plain_dtype).removeprefix("torch.")
    batches = ground.prepared.evaluation.batches[:1]
    reference = outputs(dense, batches)
    differences = [
        float((outputs(module, batches) - reference).abs().max() / reference.abs().max()) for module in (made, halves)
    ]
    size = size_of(network, made, {})
    return Trial(
        Side(f"{label}, nothing rounded", size, None),
        Side(f"{label}, in {kind}", size, None),
        Figures(EXACTNESS, *differences),
    )


@torch.inference_mode()
def outputs(module: nn.Module, batches: Sequence[Batch]) -> Tensor:
    return torch.cat([numbers(output_of(module, batch)) for batch in batches])


def output_of(module: nn.Module, batch: Batch) -> Any:
    return module(**batch.arguments(), **({} if batch.pixels is not None else {"use_cache": False}))


# ---------------------------------------------------------------- rounded


@dataclass(frozen=True)
class Stored:
    site: Site
    recipe: str


def rounded(network: Network, module: nn.Module, recipe: str) -> tuple[nn.Module, int]:
    """(a copy with every linear rounded and the tables as 8-bit rows, bytes of its file)."""
    made = copy.deepcopy(module)
    table = uniform_recipes(parse_recipe(recipe), TABLES)[1]
    stored: dict[str, Stored] = {}
    with torch.no_grad():
        for site in find_sites(made).sites:
            if site.kind == "position":
                continue
            chosen = fitted(str(parse_recipe(recipe if site.kind == "linear" else table)), site.columns)
            parameter = made.get_parameter(site.parameter)
            statistics = SiteStatistics.uninformed(site.rows, site.columns)
            encoded = parse_recipe(chosen).encoder.encode(site.as_matrix(parameter.detach()).contiguous(), statistics)
            parameter.copy_(site.as_kept(encoded.decode()))
            stored[site.name] = Stored(site, chosen)
        for name, parameter in made.named_parameters():
            if name.removesuffix(".weight") not in stored:
                parameter.copy_(parameter.to(network.plain_dtype).float())
    return made, size_of(network, made, stored)


def size_of(network: Network, module: nn.Module, stored: dict[str, Stored]) -> int:
    """Bytes of the weights file, its header included."""
    encoded: dict[str, Layout] = {
        f"{name}.weight": layout_of(s.recipe, s.site.rows, s.site.columns) for name, s in stored.items()
    }
    plain = {n: (network.plain_dtype, tuple(p.shape)) for n, p in module.named_parameters() if n not in encoded}
    return predicted_size(encoded, plain, network.checkpoint)


@torch.inference_mode()
def losses_of(ground: Ground, dense: nn.Module, modules: Sequence[nn.Module]) -> list[float]:
    """Mean loss per term of every module on the held-out batches."""
    loss, totals, terms = ground.prepared.loss, [0.0] * len(modules), 0
    with ground.watch.stage("evaluate", len(ground.prepared.evaluation.batches)) as advance:
        for batch in ground.prepared.evaluation.batches:
            wanted = loss.target(output_of(dense, batch), batch)
            for i, module in enumerate(modules):
                found = loss.target(output_of(module, batch), batch)
                totals[i] += float(loss.distances(wanted, found).double().sum())
            terms += loss.terms(batch)
            advance()
    return [max(0.0, total / max(1, terms)) for total in totals]
