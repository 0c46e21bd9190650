"""The act *apply*: assemble the artifact that a plan describes from the encodings in the work folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from layerwise.acts.activations import input_layouts
from layerwise.acts.candidates import kept_layout
from layerwise.acts.kept import Candidates, Rebuilt, rebuilt
from layerwise.acts.prepare import Prepared
from layerwise.acts.wanted import predicts
from layerwise.encoding.encoded import Encoded, Layout, layout_bytes
from layerwise.encoding.inputs import InputGrid
from layerwise.network.artifact import artifact_layout, with_inputs, write_artifact
from layerwise.network.checkpoint import to_plain
from layerwise.network.network import Network
from layerwise.plan.candidates import layout_of
from layerwise.plan.file import PlanBudget, PlanFile, PlanNetwork, Predicted, make_plan, write_plan
from layerwise.plan.tree import Allocation, Node
from layerwise.roles import ActivationQuantizer

UNPREDICTED = "not predicted, since encoding it needed no gradients"  # in place of the damage's unit


@dataclass(frozen=True)
class Applied:
    """What was written: exact bytes of the weights file, those of the linears alone, and the plan file."""

    bytes: int
    linear_bytes: int
    plan: PlanFile


def apply_plan(
    prepared: Prepared,
    candidates: Candidates,
    allocation: Allocation,
    tree: Node,
    budget: int,
    folder: Path,
    fingerprint: str,
    inputs: Mapping[str, InputGrid] = MappingProxyType({}),
) -> Applied:
    """Write weights, config, companions and ``plan.json`` into ``folder``; ``inputs``: site -> grid of its inputs.

    Raises ``RuntimeError`` if the file's size is not the predicted one: that would be our mistake, not the user's.
    """
    recipes = {name: c.recipe for name, c in allocation.sites.items()}
    made = rebuilt(candidates, recipes)
    quantizer = prepared.activations
    predicted = predicted_bytes(made.network, made.recipes, quantizer)
    written = write_network(made, folder, inputs)
    if written != predicted:
        raise RuntimeError(f"the artifact has {written} bytes, predicted were {predicted}")
    plan = plan_of(prepared, candidates, allocation, tree, budget, fingerprint)
    write_plan(folder / "plan.json", plan)
    return Applied(written, linear_bytes(made.network, made.recipes), plan)


def plan_of(
    prepared: Prepared, candidates: Candidates, allocation: Allocation, tree: Node, budget: int, fingerprint: str
) -> PlanFile:
    """The plan file of an allocation, with the exact size that applying it will give."""
    network, options = prepared.network, prepared.options
    made = rebuilt(candidates, {name: c.recipe for name, c in allocation.sites.items()})
    asked = next(filter(None, (options.budget, options.quality_loss, options.uniform)), "plan")
    return make_plan(
        tree,
        allocation,
        PlanNetwork(network.name, fingerprint, network.tree.parameters),
        PlanBudget(asked, budget),
        Predicted(
            predicted_bytes(made.network, made.recipes, prepared.activations),
            allocation.damage,
            prepared.loss.unit if predicts(prepared) else UNPREDICTED,
        ),
        {s.name: s.parameters for s in network.tree.sites},
        None if prepared.activations is None else str(prepared.activations),
        None if prepared.menu.target is None else prepared.menu.target.name,
    )


def write_network(made: Rebuilt, folder: Path, inputs: Mapping[str, InputGrid] = MappingProxyType({})) -> int:
    """Weights, config and companions; one site in memory at a time. Returns the bytes of all safetensors."""
    network, recipes, changed = made.network, made.recipes, made.plain
    plain = network.plain_parameters(recipes)
    layout = artifact_layout(
        {f"{name}.weight": form_layout(network, name, recipe) for name, recipe in recipes.items()},
        network.plain_layout(recipes),
        turned(network),
    )
    layout = with_inputs(layout, {site: layout_of_tensors(grid.tensors()) for site, grid in inputs.items()})
    kernels = {s.parameter: s.kernel for s in network.tree.sites if s.kernel is not None}

    def encoded() -> Iterator[tuple[str, Encoded]]:
        for name, fetch in made.encoded.items():
            yield f"{name}.weight", fetch()

    def dense() -> Iterator[tuple[str, Tensor]]:
        for name in plain:
            value = changed[name] if name in changed else network.read(name)
            yield name, to_plain(value, network.plain_dtype, name)
        for name in network.kept_buffers():
            yield name, network.checkpoint.read(name)

    opened = any(s.experts for s in network.tree.sites)
    return write_artifact(
        folder, network.checkpoint, layout, encoded(), dense(), turned(network), kernels, opened, inputs
    )


def layout_of_tensors(tensors: Mapping[str, Tensor]) -> Layout:
    return {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in tensors.items()}


def predicted_bytes(network: Network, recipes: dict[str, str], quantizer: ActivationQuantizer | None = None) -> int:
    """Exact bytes of the artifact's safetensors, from shapes alone."""
    from layerwise.network.artifact import predicted_size

    encoded = {f"{name}.weight": form_layout(network, name, recipe) for name, recipe in recipes.items()}
    inputs = input_layouts(network, recipes, quantizer)
    return predicted_size(encoded, network.plain_layout(recipes), network.checkpoint, inputs)


def form_layout(network: Network, site: str, recipe: str):  # type: ignore[no-untyped-def]
    found = network.tree.find(site)
    return kept_layout(found, layout_of(recipe, found.rows, found.columns))


def turned(network: Network) -> set[str]:
    return {s.parameter for s in network.tree.sites if s.transposed}


def linear_bytes(network: Network, recipes: dict[str, str]) -> int:
    """Payload bytes of the linears alone, for comparisons with identical tables."""
    linears = {s.name for s in network.tree.sites if s.kind == "linear"}
    return sum(layout_bytes(form_layout(network, name, recipe)) for name, recipe in recipes.items() if name in linears)
