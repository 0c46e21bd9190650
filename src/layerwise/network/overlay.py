"""A network's weights with some sites replaced by their stored forms, decoded when they are read.

Every parameter passes through what the artifact would hold: an encoded site is decoded, all else is rounded to the
artifact's 16-bit type. What is evaluated is what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from layerwise.encoding.encoded import Encoded
from layerwise.encoding.inputs import InputGrid
from layerwise.network.network import Network

Fetch = Callable[[], Encoded]


class Overlay:
    """Weights of ``network`` as an artifact stores them.

    encoded:  site name -> a function that fetches its stored form (from memory or from disk).
    plain:    parameter name -> replacement, for parameters that a rewrite changed.
    exact:    leave everything else as the checkpoint has it (to measure one site alone).
    inputs:   site name -> grid that its inputs are rounded to, where they are.
    """

    def __init__(
        self,
        network: Network,
        encoded: Mapping[str, Fetch],
        plain: Mapping[str, Tensor] | None = None,
        exact: bool = False,
        inputs: Mapping[str, InputGrid] | None = None,
    ) -> None:
        self.network, self.encoded, self.plain, self.exact = network, encoded, plain or {}, exact
        self.inputs: Mapping[str, InputGrid] = inputs or {}
        self.sites = {s.parameter: s for s in network.tree.sites if s.name in encoded}

    def giving(self, inputs: Mapping[str, InputGrid]) -> Overlay:
        """The same weights, multiplied by inputs on these grids."""
        return Overlay(self.network, self.encoded, self.plain, self.exact, inputs)

    def read(self, parameter: str) -> Tensor:
        site = self.sites.get(parameter)
        if site is not None:
            return site.as_kept(self.encoded[site.name]().decode())
        value = self.plain[parameter] if parameter in self.plain else self.network.read(parameter)
        return value if self.exact else value.to(self.network.plain_dtype).float()

    def read_part(self, path: str) -> dict[str, Tensor]:
        part = self.network.module.get_submodule(path)
        return {name: self.read(f"{path}.{name}") for name, _ in part.named_parameters()}

    def read_rows(self, parameter: str, index: Tensor) -> Tensor:
        site = self.sites.get(parameter)
        if site is not None:
            return self.encoded[site.name]().take_rows(index)
        rows = self.network.read_rows(parameter, index)
        return rows if self.exact else rows.to(self.network.plain_dtype).to(torch.float32)
