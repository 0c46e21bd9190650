"""WideNet: one block for all depths, told apart by their norms.

    h = x + MHA(LN1_l(x)),   y = h + FFN(LN2_l(h)),   l = 0 … L-1: attention and FFN shared, the norms each depth's own

A norm's gain and offset are a diagonal and a bias of the shared matrix, ``W (g u + c) = (W diag g) u + W c``, so L
depths are L different functions for ``2 d`` numbers each, and a token may be treated differently at every depth.

Here it is made from a trained network: ``blocks`` stored blocks (1 is the paper's), each the mean of those that it
stands for and run in turn (``l mod blocks``), then ``steps`` of distillation from the dense network on the calibration
text, in memory. ``own_norms=false`` shares the norms too, for the ablation.

Source: F. Xue et al., *Go Wider Instead of Deeper*, arXiv 2107.11817. The paper trains from scratch and gives the
shared block its width back by a mixture of experts, which is not here: what is made is of the class that it came as.

Measured on docs-lm (5 blocks in 1, 40 steps of 8 x 64 tokens, KL on other text, two seeds): own norms 3.16, shared
ones 3.17, the seeds 0.05 apart. So short a training does not tell them apart; rounding to as many bytes leaves 0.009.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import NetworkSurgeon
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from layerwise.calibrate.passes import Calibration
    from layerwise.engine.progress import Progress
    from layerwise.network.network import Network


@technique(
    paper="WideNet",
    menu=("blocks=1", "blocks=2", "blocks=1,steps=3"),
    left_out="the mixture of experts that makes the shared block wider, and training from scratch",
)
class Widenet(NetworkSurgeon):
    """One block at every depth, with norms of each depth's own."""

    blocks: int = option(1, minimum=1, help="blocks that are stored; as many as there are changes nothing")
    own_norms: bool = option(True, help="each depth keeps its norms and biases")
    steps: int = option(0, minimum=0, help="steps of distillation from the dense network, all in memory")
    rate: float = option(1e-3, minimum=0, maximum=1, help="peak learning rate of the distillation")
    seed: int = option(0, minimum=0, help="of the order of the sequences")

    @property
    def rivals(self) -> tuple[str, ...]:  # type: ignore[override]
        """The same with norms shared too, trained as long."""
        return (f"widenet:blocks={self.blocks},own_norms=false,steps={self.steps}",)

    def operate(self, network: Network, calibration: Calibration, progress: Progress) -> Network:
        from layerwise.errors import InputError
        from layerwise.factorize._tied import Tie
        from layerwise.factorize._uptrain import taught

        depth = len(network.tree.blocks)
        if self.blocks > depth:
            raise InputError(f"{network.name} has {depth} blocks, so 1 to {depth} can be stored, not {self.blocks}")
        tie = Tie(-(-depth // self.blocks), own=self.own_norms)
        return taught(network, tie, calibration, progress, self.steps, self.rate, self.seed)
