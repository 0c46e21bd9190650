"""The setting ``--activations``: which linears multiply quantized inputs, on which grids, and what these store.

It is one setting for the network. It reaches every encoded linear that is no convolution; heads, whose outputs are the
network's own, and linears that are kept at 16 bits multiply floats. A static grid is measured on the stored network,
not the dense one, because rewrites change what inputs span, and inside blocks only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from layerwise.calibrate.input_ranges import InputRanges, measure_input_ranges
from layerwise.calibrate.passes import Calibration
from layerwise.encoding.encoded import Layout, layout_bytes
from layerwise.encoding.inputs import InputGrid
from layerwise.errors import InputError
from layerwise.network.artifact import Artifact
from layerwise.network.network import Network
from layerwise.network.overlay import Overlay
from layerwise.network.safetensors_file import header_share
from layerwise.network.sites import Site
from layerwise.network.streaming import Batch
from layerwise.plan.constraints import is_dense
from layerwise.plan.file import read_plan
from layerwise.recipe import parse_activations
from layerwise.roles import ActivationQuantizer


def quantizer_of(asked: str | None, plan: str | None, network: Network) -> ActivationQuantizer | None:
    """The setting that was asked for, else that of the plan file to be applied; ``InputError`` where it cannot be."""
    text = read_plan(plan).activations if asked is None and plan is not None else asked
    if text is None:
        return None
    found = parse_activations(text)
    if found.static and network.whole:
        raise InputError(
            f"{found.name} measures inputs block by block, and a network that was opened as a module has no blocks; "
            f"give --activations token_int:bits=8"
        )
    return found


def sites_with_inputs(
    network: Network, recipes: Mapping[str, str], quantizer: ActivationQuantizer | None
) -> tuple[Site, ...]:
    """The linears whose inputs are quantized, under these recipes."""
    if quantizer is None:
        return ()
    encoded = (network.tree.find(name) for name, recipe in recipes.items() if not is_dense(recipe))
    return tuple(s for s in encoded if takes_integers(s, quantizer))


def takes_integers(site: Site, quantizer: ActivationQuantizer) -> bool:
    inside = site.block is not None or not quantizer.static
    return site.kind == "linear" and site.kernel is None and inside


def input_layouts(
    network: Network, recipes: Mapping[str, str], quantizer: ActivationQuantizer | None
) -> dict[str, Layout]:
    """Site -> what the grid of its inputs stores."""
    sites = sites_with_inputs(network, recipes, quantizer)
    return {site.name: quantizer.layout(site.columns) for site in sites} if quantizer is not None else {}


def most_input_bytes(network: Network, quantizer: ActivationQuantizer | None) -> int:
    """Bytes that grids add to the file if every linear has one, their share of the header included."""
    if quantizer is None:
        return 0
    total, below = 0, network.checkpoint.safetensors_bytes * 2
    for site in network.tree.sites:
        if takes_integers(site, quantizer):
            layout = quantizer.layout(site.columns)
            total += layout_bytes(layout)
            total += sum(header_share(f"{site.name}.input{end}", *entry, below) for end, entry in layout.items())
    return total


def input_grids(
    weights: Overlay,
    recipes: Mapping[str, str],
    quantizer: ActivationQuantizer | None,
    calibration: Calibration,
    batches: Sequence[Batch],
) -> dict[str, InputGrid]:
    """Site -> grid of its inputs; ``weights`` are those that ``recipes`` make, by names of their own network."""
    sites = sites_with_inputs(weights.network, recipes, quantizer)
    if quantizer is None or not sites:
        return {}
    if not quantizer.static:
        return {site.name: quantizer.grid(None) for site in sites}
    ranges = measure_input_ranges(weights.network, batches, calibration.folder, calibration.device, weights)
    return {site.name: quantizer.grid(read_by(ranges[site.name], weights, site)) for site in sites}


def read_by(ranges: InputRanges, weights: Overlay, site: Site) -> InputRanges:
    """Ranges together with the matrix that reads the inputs, as it is stored."""
    return replace(ranges, weight=site.as_matrix(weights.read(site.parameter)))


def grids_of_artifact(artifact: Artifact, network: Network, text: str | None) -> dict[str, InputGrid] | None:
    """Grids for the linears of a saved artifact, made from ``network``; None where nothing is asked for.

    Raises ``InputError`` for a setting that would have to be measured first: its grids are stored by *compress*.
    """
    if text is None:
        return None
    quantizer = parse_activations(text)
    if quantizer.static:
        raise InputError(
            f"{quantizer.name} measures inputs on calibration text before anything is stored; give "
            f"--activations {quantizer} to compress, and evaluate what it wrote"
        )
    linears = {s.name for s in network.tree.sites if takes_integers(s, quantizer)}
    return {site: quantizer.grid(None) for site in artifact.sites if site in linears}
