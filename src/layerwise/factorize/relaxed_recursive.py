"""Relaxed Recursive Transformer: L blocks become K blocks run in a loop, each pass with a little of its own.

    depth l runs stored block l mod K,  K = ceil(L / loops):    W_l ~ W + B_l A_l,   B_l [m, r], A_l [r, n]
    B_l A_l = the best rank r of W_l - W:    what is lost is sum_{i > r} sigma_i^2 of the residual

W is the mean of the blocks that it stands for (``start=average``), one of them at equal strides (``stepwise``), or the
first K (``lower``). Every depth keeps its own norms and biases; each has its own KV cache. Stored are K blocks and
``r (m + n)`` values for each matrix and depth; the same number of multiplications is done as before, or a few more.

The paper then trains all of it on billions of tokens against the original's predictions. ``steps`` of the same
distillation are taken here on the calibration text, in memory: for small networks, and for measuring the idea.

Source: S. Bae et al., *Relaxed Recursive Transformers: Effective Parameter Sharing with Layer-wise LoRA*, arXiv
2410.20672. Ours: K need not divide L; ``refits`` rounds that fit mean and corrections to each other (the mean is the
best W only at r = 0), which never raise the sum of squares; ``residual=false`` starts corrections at zero, for the
ablation.

Measured on docs-lm (5 blocks in 3, 40 steps of 8 x 64 tokens, KL on other text): rank 16 from the residual
1.05; the same bytes with corrections from zero 1.92; rank 0, which is 12 % smaller, 1.98. So the idea holds; rounding
leaves 0.0002 in fewer bytes.
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
    paper="Relaxed Recursive Transformer",
    menu=("rank=0", "rank=16", "rank=16,refits=20", "rank=4,steps=3"),
    left_out="training at the paper's scale, and early exits that share a batch over depths",
)
class RelaxedRecursive(NetworkSurgeon):
    """Blocks run in a loop, with low-rank corrections and norms for each pass."""

    loops: int = option(2, minimum=1, help="times that the stored blocks run; 1 changes nothing")
    rank: int = option(16, minimum=0, help="rank of each depth's corrections; 0 = the blocks are tied outright")
    start: str = option("average", choices=("average", "stepwise", "lower"), help="what the shared block starts as")
    residual: bool = option(True, help="corrections start at what tying took away; false: at nothing")
    refits: int = option(0, minimum=0, maximum=1000, help="times shared block and corrections are fitted in turns")
    own_norms: bool = option(True, help="each depth keeps its norms and biases")
    steps: int = option(0, minimum=0, help="steps of distillation from the dense network, all in memory")
    rate: float = option(1e-3, minimum=0, maximum=1, help="peak learning rate of the distillation")
    seed: int = option(0, minimum=0, help="of the order of the sequences")

    @property
    def rivals(self) -> tuple[str, ...]:  # type: ignore[override]
        """Blocks dropped instead of tied, tied outright, and corrections that start at nothing; trained as long."""
        named = f"relaxed_recursive:loops={self.loops},start={self.start},steps={self.steps}"
        plain = () if self.steps else (f"drop_block:count={self.loops}",)
        return *plain, f"{named},rank=0", *((f"{named},rank={self.rank},residual=false",) if self.steps else ())

    def operate(self, network: Network, calibration: Calibration, progress: Progress) -> Network:
        from layerwise.factorize._tied import Tie
        from layerwise.factorize._uptrain import taught

        tie = Tie(self.loops, "cycle", self.start, self.rank, self.residual, self.refits, self.own_norms)
        return taught(network, tie, calibration, progress, self.steps, self.rate, self.seed)
