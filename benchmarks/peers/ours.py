"""Our side of the comparison: the one evaluation that measures everybody, and plans of the peers' exact sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarks.runs import Run
from torch import Tensor

from layerwise.acts.apply import form_layout
from layerwise.acts.kept import Candidates, fetches
from layerwise.acts.tuning import tune
from layerwise.encoding.encoded import layout_bytes
from layerwise.errors import InputError
from layerwise.evaluate.compare import compare
from layerwise.network.network import Network
from layerwise.network.overlay import Overlay
from layerwise.network.safetensors_file import read, read_header
from layerwise.network.streaming import Weights
from layerwise.plan.pareto import Pareto
from layerwise.plan.tree import Choice, Leaf, Node, Sum
from layerwise.recipe import parse_tuner


class Replaced:
    """The checkpoint's weights, as exact as it has them, with some parameters taken from a file instead."""

    def __init__(self, network: Network, file: Path) -> None:
        self.network, self.file = network, file
        self.found, _ = read_header(file)

    def read(self, parameter: str) -> Tensor:
        return read(self.found[parameter]).float() if parameter in self.found else self.network.read(parameter)

    def read_part(self, path: str) -> dict[str, Tensor]:
        part = self.network.module.get_submodule(path)
        return {name: self.read(f"{path}.{name}") for name, _ in part.named_parameters()}

    def read_rows(self, parameter: str, index: Tensor) -> Tensor:
        if parameter in self.found:
            return self.read(parameter)[index]
        return self.network.read_rows(parameter, index)


def replaced(network: Network, file: Path) -> Replaced:
    """Weights from a quantizer's file. Raises ``InputError`` where it does not hold every linear of the blocks."""
    weights = Replaced(network, file)
    missing = [s.name for s in network.tree.sites if s.kind == "linear" and s.parameter not in weights.found]
    if missing:
        raise InputError(f"{file} has no {missing[0]}; it must hold every linear of the blocks")
    return weights


@dataclass(frozen=True)
class Planned:
    """A plan of linears that is no larger than a budget."""

    bytes: int
    weights: Overlay


def plans(run: Run, budgets: Iterable[int], tuner: str | None) -> dict[int, dict[str, Planned]]:
    """Budget -> the plan, and what the tuner makes of it; no entry where nothing is that small.

    Bytes are those of the stored tensors, which is what is counted for a peer. Tables, heads and norms are the
    checkpoint's own.
    """
    network = run.prepared.network
    tree = payload_tree(run.candidates.tree(), network)
    found: dict[int, dict[str, Planned]] = {}
    for budget in sorted(set(budgets)):
        try:
            allocation = Pareto().allocate(tree, budget)
        except InputError:
            continue
        recipes = {name: candidate.recipe for name, candidate in allocation.sites.items()}
        size = sum(layout_bytes(form_layout(network, name, recipe)) for name, recipe in recipes.items())
        refitted = run.refitted(recipes)
        found[budget] = {"plan": Planned(size, linears_only(run, refitted, recipes))}
        if tuner:
            tuned = tune(run.calibration, refitted, recipes, parse_tuner(tuner), run.prepared.splits.all, run.watch)
            found[budget][f"plan, {tuner}"] = Planned(size, linears_only(run, tuned, recipes))
    return found


def linears_only(run: Run, candidates: Candidates, recipes: dict[str, str]) -> Overlay:
    """The checkpoint, exactly, with the linears as stored."""
    return Overlay(run.prepared.network, fetches(candidates, recipes), exact=True)


def payload_tree(node: Node, network: Network) -> Node:
    """The tree of the linears, with the bytes of their tensors alone, without shares of a file's header."""
    if isinstance(node, Leaf):
        kept = [
            dataclasses.replace(c, bytes=layout_bytes(form_layout(network, node.name, c.recipe)))
            for c in node.candidates
        ]
        return Leaf(node.name, tuple(kept))
    if isinstance(node, Sum):
        linears = {s.name for s in network.tree.sites if s.kind == "linear"}
        inside = [c for c in node.children if not isinstance(c, Leaf) or c.name in linears]
        return Sum(node.name, tuple(payload_tree(child, network) for child in inside))
    return Choice(node.name, tuple((label, payload_tree(option, network)) for label, option in node.options))


def evaluate(run: Run, variants: dict[str, Weights]) -> dict[str, dict[str, float]]:
    """Name -> metrics on the held-out text, the dense network's under ``dense``."""
    prepared, network = run.prepared, run.prepared.network
    torch.set_num_threads(prepared.options.threads)
    with run.watch.stage("evaluate", (1 + len(variants)) * len(network.tree.blocks)) as advance:
        found = compare(
            network, variants, prepared.loss, prepared.evaluation.batches, run.calibration.folder,
            prepared.options.device, advance,
        )  # fmt: skip
    return {name: measured.metrics for name, measured in found.items()}
