"""Rotation by Hadamard matrices: every channel of the residual stream becomes a mixture of all of them.

    stream   x <- x Q, exactly undone by whoever reads it (``network/basis.py``):  norm gains folded into the readers,
             readers W diag(g) Q, writers and tables E Q, W <- Q^T W
    heads    V_h <- R^T V_h, O_h <- O_h R for every attention head h

With Q = H diag(±1) / sqrt(d) an outlier channel is spread over all d, and max/rms falls towards sqrt(2 ln d). The
network computes the same function and stays one of its own class; nothing runs in addition. Where LayerNorms read the
stream, Q = H diag(±1) H^T / d with the first sign +, which keeps 1 and so commutes with taking the mean off; the mean
itself, which no LayerNorm reads, is taken out of the writers first, as pre_rmsnorm does. A size for which no Hadamard
matrix is known gets a random orthogonal matrix. A head that is tied to the table gets a matrix of its own (V d
parameters more), as the last norm's gain is folded into one and not into the other.

The order is rotate, then scale, then encode: ``--rewrite hadamard`` comes before calibration, so AWQ and the encoders
see the rotated network.

Measured on docs-lm (2.4 M parameters, no outlier channels), groups of 64, KL at 4 / 3 / 2 bits: GPTQ 0.0173 / 0.0750 /
0.394 as it is and 0.0178 / 0.0766 / 0.408 rotated; round to nearest 0.0210 / 0.0866 / 0.427 and 0.0221 / 0.0940 /
0.451.
Rotation makes weights Gaussian, and a small trained network's are easier to round than that; it pays where a few
channels are far larger than the others, as in large networks, and for activations.

Source: Ashkboos et al., *QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs*, arXiv 2404.00456; incoherence by
rotation is from Chee et al., *QuIP*, arXiv 2307.13304. Left out are the paper's online rotations (the input of the
down projection, queries and keys), which need kernels and serve quantized activations. Left open there and chosen
here: a rotation that keeps 1 in place of a change of class, and that what reads and writes is found by trial.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from layerwise.network.basis import BasisStream, Changes, changes_of
from layerwise.network.basis_search import find_basis_stream
from layerwise.network.network import Change, Network
from layerwise.network.norms import RECORD, untie
from layerwise.network.orthogonal import mixing
from layerwise.network.residual import centre
from layerwise.roles import NetworkRewrite
from layerwise.technique import option, technique

MARK = "layerwise_rotation"  # attribute of a converted module


@technique(paper="QuaRot")
class Hadamard(NetworkRewrite):
    """Rotate the residual stream and the attention heads' values so that no channel stands out."""

    matrix: str = option("hadamard", choices=("hadamard", "random"), help="Hadamard, or random orthogonal matrices")
    heads: bool = option(True, help="rotate the values of every attention head as well")
    seed: int = option(0, minimum=0, help="seed of the signs, or of the random matrices")

    def rewrite(self, network: Network) -> Network:
        if was_rotated(network.checkpoint.config.get(RECORD)):
            return network
        stream = find_basis_stream(network.module, self.name)
        network = network.untied() if stream.shared else network
        changes = self.changes(stream, network.read)
        rows = {name for name, axis in _axes(stream).items() if axis != 0}
        return network.changed(
            {name: Change(change, by_rows=name in rows) for name, change in changes.items()},
            {RECORD: {"rewrite": str(self)}},
        )

    def convert(self, module: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> nn.Module:
        made = copy.deepcopy(module)
        if hasattr(module, MARK):
            return made
        stream = find_basis_stream(module, self.name, inputs)
        untie(made, stream.shared)
        before = {name: value.detach().clone() for name, value in made.named_parameters()}
        with torch.no_grad():
            for name, change in self.changes(stream, before.__getitem__).items():
                made.get_parameter(name).copy_(change(before[name]))
        setattr(made, MARK, str(self))
        return made

    def changes(self, stream: BasisStream, read: Callable[[str], Tensor]) -> Changes:
        """What happens to every parameter; ``read`` gives the untied network's values."""
        random = self.matrix == "random"
        turn = mixing(stream.width, self.seed, stream.keeps_ones, random)
        heads = (lambda size: mixing(size, self.seed, random=random)) if self.heads else None
        found = changes_of(stream, read, turn, heads)
        if stream.keeps_ones:
            for name, axis in stream.writers.items():
                found[name] = _centred_first(found[name], axis)
        return found


def was_rotated(record: object) -> bool:
    """Whether config.json says that the stream was rotated before."""
    return isinstance(record, Mapping) and str(record.get("rewrite", "")).startswith("hadamard")


def _centred_first(change: Callable[[Tensor], Tensor], axis: int) -> Callable[[Tensor], Tensor]:
    return lambda value: change(centre(value.double(), axis)).to(value.dtype)


def _axes(stream: BasisStream) -> dict[str, int]:
    """Parameter -> the axis that is turned. A change of another axis leaves rows to themselves."""
    return {**stream.writers, **{reader: axis for norm in stream.norms for reader, axis in norm.readers.items()}}
