"""Structured pruning: whole attention heads and MLP channels go, and the network is a smaller dense one.

A unit u is a channel between the two matrices of an MLP, or a key-value head with the query heads that read it. Put a
gate of 1 on what it hands on; ``v_u`` is the derivative of a sequence's loss in that gate, labels drawn from the
network's own distribution (``calibrate/gates.py``). Scores, the lowest go:

    fisher      E[v_u^2]: twice the rise of the loss when u alone goes, to second order
    taylor      E|v_u|: the size of the first-order change (Michel et al. for heads)
    magnitude   L2 norm of all slices of the unit together (rows of up, gate, q, k, v and their biases; columns of down,
                o), without data

Every block loses the same number of units, the ones with the lowest scores of its own, so that the config stays one
which the plain class loads: the result is an ordinary checkpoint, smaller and faster on any runtime. ``refit`` (on by
default) gives the matrix that reads the units the least-squares best ``W' = W C_:S C_SS^-1`` on what is left,
``C = E[x x^T]`` of its inputs, damped by 1e-3; a unit that the others can say then costs little. In memory beside a
block is one such C, and for each block the [n, kept] matrix by which it is mixed, until the result is written.

Sources: P. Molchanov et al., *Importance Estimation for Neural Network Pruning*, arXiv 1906.10771 (Taylor); P. Michel
et al., *Are Sixteen Heads Really Better than One?*, arXiv 1905.10650; W. Kwon et al., *A Fast Post-Training Pruning
Framework for Transformers*, arXiv 2204.09656 (Fisher information of masks, least squares after). Chosen here: cross
terms between units are left out, as in the diagonal form; one shot. Networks whose class takes the width of a head from
the number of heads (BERT, GPT-2, ViT) lose channels only; fused matrices and experts are refused by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from layerwise.roles import NetworkSurgeon
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.gates import Gates
    from layerwise.calibrate.passes import Calibration
    from layerwise.engine.progress import Progress
    from layerwise.network.network import Network
    from layerwise.network.widths import Width


@technique(paper="STRUCTURED", menu=("channels=0.25", "heads=0.34"))
class Structured(NetworkSurgeon):
    """Heads and MLP channels of least Fisher information are removed, the same number in every block."""

    heads: float = option(0.0, minimum=0, maximum=0.95, help="share of the heads to remove")
    channels: float = option(0.0, minimum=0, maximum=0.95, help="share of the MLP's channels to remove")
    score: str = option("fisher", choices=("fisher", "taylor", "magnitude"), help="what says how much a unit matters")
    refit: bool = option(True, help="refit the matrix that reads what is left, by least squares")
    rivals: ClassVar[tuple[str, ...]] = tuple(
        f"structured:{shares},{other}"
        for shares in ("channels=0.25", "heads=0.34")
        for other in ("refit=false", "score=taylor", "score=magnitude")
    )

    def operate(self, network: Network, calibration: Calibration, progress: Progress) -> Network:
        from layerwise.calibrate.gates import sampled_gates
        from layerwise.prune._units import cut, widths_of

        widths = widths_of(network, self.name, self.heads, self.channels)
        if not widths:
            return network
        scores: dict[str, dict[str, Tensor]] = {kind: {} for kind in widths}
        moments: dict[str, Tensor] = {}
        if self.score == "magnitude":
            for kind, (width, _) in widths.items():
                scores[kind] = {block: lengths(network, width, block) for block in network.tree.blocks}
        if self.score != "magnitude" or self.refit:
            readers = {reader for width, _ in widths.values() for reader in width.readers.values()}
            with progress.stage("gates", len(network.tree.blocks)) as advance:
                for block, gates in sampled_gates(calibration, readers, advance):
                    for kind, (width, _) in widths.items():
                        reader = gates[width.readers[block]]
                        if self.score != "magnitude":
                            scores[kind][block] = self.scored(reader, width)
                        if self.refit and reader.moment is not None:
                            moments[width.readers[block]] = reader.moment
        return cut(network, widths, scores, moments)

    def scored(self, reader: Gates, width: Width) -> Tensor:
        """Score of each unit, [units]."""
        assert reader.inputs is not None
        turned = width.sums(reader.inputs)  # v, [samples, units]
        return turned.square().mean(0) if self.score == "fisher" else turned.abs().mean(0)


def lengths(network: Network, width: Width, block: str) -> Tensor:
    """L2 norm of everything that belongs to each unit of a block, [units]."""
    import torch

    total = torch.zeros(width.units, dtype=torch.float64)
    for name, axis in width.slices[block].items():
        value = network.read(name).double().movedim(axis, 0)  # [entries, ...]
        total += width.sums(value.square().reshape(len(value), -1).sum(1))
    return total.sqrt()
