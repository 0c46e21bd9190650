"""Quantized inputs in a network that is evaluated from decoded weights: the grids of its linears, as hooks.

An artifact's packed linears carry their grids themselves (``PackedLinear.inputs``). Where a network is streamed with
dense matrices in the place of packed ones, the same grids round the same inputs here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from layerwise.encoding.inputs import InputGrid
from layerwise.errors import InputError
from layerwise.network.network import Network
from layerwise.network.sites import is_linear


def inputs_of(weights: object) -> Mapping[str, InputGrid]:
    """Site -> grid of its inputs, of weights that say so (an overlay, an artifact); else none."""
    found: Mapping[str, InputGrid] = getattr(weights, "inputs", {})
    return found


def quantize_inputs(network: Network, grids: Mapping[str, InputGrid]) -> Network:
    """Round what these sites of ``network.module`` are given, from now on; give it a module of its own (``again``)."""
    for name, grid in grids.items():
        member = network.module.get_submodule(name)
        if not is_linear(member):
            raise InputError(f"site {name} is a {type(member).__name__}, whose inputs cannot be quantized")
        member.register_forward_pre_hook(_rounding(grid))
    return network


def _rounding(grid: InputGrid) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (grid.rounded(given[0]), *given[1:])

    return hook
