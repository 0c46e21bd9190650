"""SReT: every block runs several times in a row, with a small projection of each pass's own.

    z_0 = x,   z_i = block(z_{i-1}) + B_i A_i u_i,   i = 1 … loops,   u_i = what the block's last matrix reads in pass i

Depth for no more weights; without something that differs between passes the loop degenerates, which is what the
private projection is for. In the paper it is a small MLP after every pass, ``a z + b MLP_i(LN(z))``. Here its first
layer is the block's own feed-forward part (u is its activation), its second a private ``B_i A_i`` of rank r, which adds
to the block's last matrix. Every pass has norms of its own too.

Made from a trained network: stored block j is the mean of the ``loops`` consecutive blocks that it stands for (or the
first of them), B A the truncated SVD of what that took from their last matrices, then ``steps`` of distillation from
the dense network on the calibration text, in memory. ``rank=0`` takes the projection out, for the ablation.

Source: Z. Shen, Z. Liu, E. Xing, *Sliced Recursive Transformer*, arXiv 2111.05297. Not here: attention in slices of the
tokens, which pays for the extra passes of an image classifier and would break the order of time in a causal network;
learnt coefficients of the residual paths; training from scratch.

Measured on docs-lm (5 blocks in 3, 40 steps of 8 x 64 tokens, KL on other text): rank 8 1.98; no projections 2.14,
with norms shared too 2.63, in 1.4 % fewer bytes. Rounding leaves 0.0002 in fewer bytes.
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
    paper="SReT",
    menu=("rank=0", "rank=16", "rank=4,steps=3"),
    left_out="attention in slices of the tokens, learnt coefficients of the residual paths, training from scratch",
)
class Sret(NetworkSurgeon):
    """Blocks that run several times in a row, with a private projection of each pass."""

    loops: int = option(2, minimum=1, help="times that each block runs in a row; 1 changes nothing")
    rank: int = option(16, minimum=0, help="rank of each pass's own projection; 0 = none")
    start: str = option("average", choices=("average", "lower"), help="what a stored block starts as")
    own_norms: bool = option(True, help="each pass keeps its norms and biases")
    steps: int = option(0, minimum=0, help="steps of distillation from the dense network, all in memory")
    rate: float = option(1e-3, minimum=0, maximum=1, help="peak learning rate of the distillation")
    seed: int = option(0, minimum=0, help="of the order of the sequences")

    @property
    def rivals(self) -> tuple[str, ...]:  # type: ignore[override]
        """The same without projections, and with nothing of a pass's own, trained as long."""
        named = f"sret:loops={self.loops},start={self.start},steps={self.steps},rank=0"
        return named, f"{named},own_norms=false"

    def operate(self, network: Network, calibration: Calibration, progress: Progress) -> Network:
        from layerwise.factorize._tied import Tie
        from layerwise.factorize._uptrain import taught

        tie = Tie(self.loops, "row", self.start, self.rank, own=self.own_norms, last=True)
        return taught(network, tie, calibration, progress, self.steps, self.rate, self.seed)
