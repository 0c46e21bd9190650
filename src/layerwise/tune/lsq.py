"""LSQ: the step sizes of the grid are trained together with the weights, against the whole network's loss.

For a linear with latent weight v [out, in], steps s [out, groups] and zeros z, and ``t = 2^b - 1`` the largest code,

    W' = (round(clip(v / s + z, 0, t)) - z) s
    d W' / d v = 1 where 0 <= v / s + z <= t, else 0
    d W' / d s = round(v / s) - v / s inside,   -z below,   t - z above

The gradient of s knows how far each weight is from the next transition, not only how large it is. Trained is the
network as it will be stored, every block at once, towards the dense network's own output (KL per token or example, or
squared distance of vectors). Exported are integer codes and steps; the latent weight is dropped, and s is rounded to
its stored type before it is used, so what is trained is what is stored. The state of the least loss over all sequences,
the start included, is kept.

Source: S. K. Esser et al., "Learned Step Size Quantization", arXiv 1902.08153. Choices of ours: v starts at the dense
weight drawn into the cells of the codes that an encoder chose, not at the dense weight, so that the start is that
encoder's result; v moves in levels (``v = B + s0 u``) and s by factors (``s = s0 a``), so that one pair of rates serves
every linear; Adam instead of momentum. The paper multiplies the gradient of s by ``1 / sqrt(N t)`` for N weights a
step, so that one rate serves both; Adam divides any such factor out again, and s has a rate of its own. No labels:
the dense network is the teacher. Activations stay at 16 bits, where the paper has both; zeros stay as they were given
(LSQ+ trains them), and tables and heads are not trained.

Measured on ``examples/docs-lm``, int8 tables, groups of 64, 96 sequences of 128 tokens, round to nearest at 2 bits, 100
steps, one seed: KL to the dense network 0.430 -> 0.091 on the sequences it trains on and 0.430 -> 0.258 on held-out
text. SIGNROUND, which goes block by block, reaches 0.228 from the same in as many steps: a negative result. So few
sequences are learned by heart long before the rounding is; whether more text turns it round was not tested.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Tuner
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from layerwise.encoding.encoded import Encoded
    from layerwise.tune.scope import Tuned, TunedScope


@technique(paper="LSQ")
class Lsq(Tuner):
    """Learned step sizes: the whole network is trained on its grids against the dense network."""

    scope = "network"

    steps: int = option(100, minimum=0, maximum=1_000_000, help="steps of Adam")
    sequences: int = option(8, minimum=1, maximum=4096, help="sequences a step")
    rate: float = option(0.01, minimum=0, maximum=10, help="of the weights, in levels")
    grid: float = option(0.002, minimum=0, maximum=1, help="of the steps, as a share of where they started; 0 = fixed")

    def touches(self, encoded: Encoded) -> bool:
        from layerwise.encoding.integer import GroupedInteger

        return isinstance(encoded, GroupedInteger) and not encoded.grid.float_scale

    def passes(self) -> int:
        return self.steps

    def tune(self, scope: TunedScope) -> Tuned:
        from layerwise.tune._latent import adam
        from layerwise.tune._learned_steps import LearnedSteps
        from layerwise.tune._training import fit

        share = self.grid / self.rate if self.rate else 0.0
        return fit(self, scope, lambda form, weight: LearnedSteps(form, weight, share), adam(self.rate))
