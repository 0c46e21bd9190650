"""Optimal Brain Apoptosis: a weight is scored by how the loss's curvature couples it with all other weights.

    q_i = theta_i (H theta)_i,     sum_i q_i = theta^T H theta

where the diagonal of H knows only a weight by itself. H is the Hessian of the loss, which at the dense network is the
Gauss-Newton matrix ``J^T A J``, and ``H theta`` is exact: theta's own direction goes forward through the blocks as a
tangent (J theta), is bent by the loss (A) and comes back by the ordinary reverse pass, one block in memory
(``calibrate/gates.py``). theta are the matrices of all blocks' linears; all layers are in it, as the paper wants.

    unit       all slices of one MLP channel, or of one key-value head with its queries
    q_slice    sum of q over the slice, mean over sequences, then |.|
    score      mean of q_slice over the unit's slices, over the largest in its block
    goes       the lowest of each block, the same number in every block

Source: M. Sun et al., *Optimal Brain Apoptosis*, arXiv 2502.17941, and its code's later form with a double-backward
product; the paper's analytic expressions for the Hessian between layers give the same product layer by layer. Chosen
here: the loss compares with the dense network, so that no labels are needed; biases are slices of their own; one shot
instead of small steps; ranks within a block instead of over the network, since a plain config has one width for all
blocks. ``hessian=unit`` leaves out the coupling between slices, ``theta_s^T H_ss theta_s``: the ablation.
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


@technique(
    paper="OBA",
    menu=("channels=0.25", "heads=0.34"),
    left_out="masks of single weights, many small steps, ranks across layers and the fine-tuning after",
)
class Oba(NetworkSurgeon):
    """Heads and MLP channels of least coupled curvature are removed, the same number in every block."""

    heads: float = option(0.0, minimum=0, maximum=0.95, help="share of the heads to remove")
    channels: float = option(0.0, minimum=0, maximum=0.95, help="share of the MLP's channels to remove")
    hessian: str = option("full", choices=("full", "unit"), help="all cross terms, or only those within a slice")
    refit: bool = option(False, help="refit the matrix that reads what is left, by least squares; not the paper's")
    rivals: ClassVar[tuple[str, ...]] = tuple(
        f"{name}:{shares},{other}"
        for shares in ("channels=0.25", "heads=0.34")
        for name, other in (
            ("oba", "hessian=unit"),
            ("structured", "refit=false"),
            ("structured", "refit=false,score=taylor"),
            ("structured", "refit=false,score=magnitude"),
        )
    )

    def operate(self, network: Network, calibration: Calibration, progress: Progress) -> Network:
        from layerwise.calibrate.gates import curved_gates, sampled_gates
        from layerwise.prune._units import cut, widths_of

        widths = widths_of(network, self.name, self.heads, self.channels)
        if not widths:
            return network
        scores: dict[str, dict[str, Tensor]] = {kind: {} for kind in widths}
        moments: dict[str, Tensor] = {}
        readers = {reader for width, _ in widths.values() for reader in width.readers.values()}
        measured = curved_gates if self.hessian == "full" else sampled_gates
        with progress.stage("gates", len(network.tree.blocks)) as advance:
            for block, gates in measured(calibration, readers, advance):
                for kind, (width, _) in widths.items():
                    scores[kind][block] = self.scored(gates, width, block)
                    reader = gates[width.readers[block]]
                    if self.refit and reader.moment is not None:
                        moments[width.readers[block]] = reader.moment
        return cut(network, widths, scores, moments)

    def scored(self, gates: dict[str, Gates], width: Width, block: str) -> Tensor:
        """Score of each unit of a block, [units]."""
        import torch

        found = []
        for parameter in width.slices[block]:
            site, _, leaf = parameter.rpartition(".")
            known = gates.get(site)
            if known is None:
                continue
            side = known.bias if leaf == "bias" else known.inputs if site == width.readers[block] else known.outputs
            assert side is not None
            units = width.sums(side)  # [samples, units]
            found.append(units.mean(0).abs() if self.hessian == "full" else units.square().mean(0))
        score = torch.stack(found).mean(0)
        return score / score.max().clamp_min(1e-300)
