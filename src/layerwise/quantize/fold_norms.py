"""Norm gains and biases folded into the matrices that read them, so that every norm is plain.

    y = norm(x) diag(g) + b:    W <- W diag(g),   c <- c + W b,   then g <- 1, b <- 0            for every reader (W, c)

A reader without a bias has no place for ``W b``; the norm then keeps ``b / g``. It is the first step of a rotation
(``hadamard``) on its own, and makes the readers' columns as large as they matter: a column whose gain is small is a
small column, which rounding in groups of a row then sees. Works on pre-norm networks, with RMSNorms or LayerNorms.

The last norm of a network whose head is tied to its table folds into the head and not into the table: ``last=keep``
leaves that norm as it is, ``last=untie`` gives the head a matrix of its own (V d parameters more).

Source: step 1 of Ashkboos et al., *QuaRot*, arXiv 2404.00456 (from SliceGPT, arXiv 2401.15024). Chosen here: what
happens to biases where a reader has none, and ``last``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from layerwise.network.basis import BasisStream, changes_of
from layerwise.network.basis_search import find_basis_stream
from layerwise.network.network import Change, Network
from layerwise.network.norms import untie
from layerwise.roles import NetworkRewrite
from layerwise.technique import option, technique


@technique(paper="QuaRot")
class FoldNorms(NetworkRewrite):
    """Move the gains and biases of norms into the matrices behind them."""

    last: str = option(
        "keep", choices=("keep", "untie"), help="the last norm before a tied head: left alone, or folded"
    )

    def rewrite(self, network: Network) -> Network:
        stream = self.folded(find_basis_stream(network.module, self.name))
        network = network.untied() if stream.shared else network
        changes = changes_of(stream, network.read, None)
        readers = {reader: axis for norm in stream.norms for reader, axis in norm.readers.items()}
        return network.changed(
            {name: Change(change, by_rows=readers.get(name, 0) != 0) for name, change in changes.items()}, {}
        )

    def convert(self, module: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> nn.Module:
        made = copy.deepcopy(module)
        stream = self.folded(find_basis_stream(module, self.name, inputs))
        untie(made, stream.shared)
        before = {name: value.detach().clone() for name, value in made.named_parameters()}
        with torch.no_grad():
            for name, change in changes_of(stream, before.__getitem__, None).items():
                made.get_parameter(name).copy_(change(before[name]))
        return made

    def folded(self, stream: BasisStream) -> BasisStream:
        """The stream with the norms that are to be folded."""
        if self.last == "untie":
            return stream
        heads = set(stream.shared.values())
        return replace(stream, norms=tuple(n for n in stream.norms if not heads & set(n.readers)), shared={})
