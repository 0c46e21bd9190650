"""QuEST's trust estimator: the step follows the weights' spread, and gradients pass only where rounding errs little.

For a linear with latent weight v [out, in], starting steps s0 [out, groups], zeros z and t = 2^b - 1 the largest code,

    s = s0 rms(v) / rms(v0)  of each group, without a gradient
    W' = (clip(round(v / s + z), 0, t) - z) s
    d W' / d v = 1 where |v - W'| <= trust s / 2, else 0

The step that errs least on a near Gaussian group is a constant times its root mean square, so it is computed and not
learned: a step of its own for each group that neither drifts nor oscillates. A straight-through gradient is right only
for weights that rounding moves little; one that is cut off by more than half a step is not trusted and waits until the
group's spread lets it back in, while one that lies just outside of the outermost level still learns. Everything is
trained at once towards the dense network's own output (KL per token or example, or squared distance of vectors).
Exported are integer codes and steps. The state of the least loss over all sequences, the start included, is kept.

Source: A. Panferov et al., "QuEST: Stable Training of LLMs with 1-Bit Weights and Activations", arXiv 2502.05003.
**What is missing of it:** the paper rounds ``v H`` for a block Hadamard matrix H and masks the gradient there, which is
what makes groups Gaussian. That needs a stored form which holds rotated codes and turns the activations (or the decoded
weight) back; a tuner may not change the layout that the plan chose, so here v is rounded unrotated. The activations,
which the paper rounds by the same rule, stay at 16 bits; and the levels are those of the given grid, which has a zero,
where the paper's lie at odd half steps. So the constant is not the Gaussian one either: it is the ratio of the step
that an encoder chose for the group to the group's root mean square, kept throughout. Adam with half a cosine; no
labels, since the dense network is the teacher.

Measured on ``examples/docs-lm``, int8 tables, groups of 64, 96 sequences of 128 tokens, round to nearest at 2 bits, 100
steps, one seed: KL to the dense network 0.430 -> 0.090 on the sequences it trains on and 0.430 -> 0.257 on held-out
text. Learned steps (LSQ) in its place: 0.258, so without the rotation computed steps do as well and no better.
SIGNROUND, block by block, reaches 0.228 in as many steps: with so little text training the whole network does not pay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Tuner
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from layerwise.encoding.encoded import Encoded
    from layerwise.tune.scope import Tuned, TunedScope


@technique(
    paper="QuEST",
    left_out="the Hadamard rotation, one-bit weights and quantized activations",
)
class Quest(Tuner):
    """Trained rounding with steps from statistics and a trust mask on the gradient, without the rotation."""

    scope = "network"

    steps: int = option(100, minimum=0, maximum=1_000_000, help="steps of Adam")
    sequences: int = option(8, minimum=1, maximum=4096, help="sequences a step")
    rate: float = option(0.01, minimum=0, maximum=10, help="of the weights, in levels")
    trust: float = option(1.0, minimum=0, maximum=1e6, help="largest trusted error, in half steps")

    def touches(self, encoded: Encoded) -> bool:
        from layerwise.encoding.integer import GroupedInteger

        return isinstance(encoded, GroupedInteger) and not encoded.grid.float_scale

    def passes(self) -> int:
        return self.steps

    def tune(self, scope: TunedScope) -> Tuned:
        from layerwise.tune._latent import adam
        from layerwise.tune._training import fit
        from layerwise.tune._trust import Trusted

        return fit(self, scope, lambda form, weight: Trusted(form, weight, self.trust), adam(self.rate))
