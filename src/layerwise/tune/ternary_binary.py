"""Ternary weights whose scale is a statistic of the latent weight, trained against the dense network.

For a linear with latent weight v [out, in] and the groups of its stored form,

    a = 4/3 mean |v| of each group, without a gradient,      W' = a clip(round(v / a), -1, 1)
    d W' / d v = 1 everywhere (straight through)

A weight becomes zero below a / 2 = 2/3 mean |v|: a uniform group is cut into exact thirds, a Gaussian one gets 40 % of
zeros, and the energy of the output stays near what it was (0.94 and 0.82 of the deviation). The scale is taken anew at
every step, so it cannot drift away from the weights as a learned one may. The whole network is trained at once
towards the dense network's own output. a is rounded to its stored type before it is used. The state of the least loss
over all sequences is kept, the start included.

Stored in the 2-bit integer form that the plan chose, in three codes around its zero; so its bytes are those of the
plan, and a form of its own (1.6 bits a weight) would be smaller. What was there before has four levels: until three
trained ones beat them, the start is what is kept. Forms of more bits are left alone.

Source: Z. Liu et al., "Binary and Ternary Natural Language Generation", arXiv 2306.01841, the ternary weights. Its
scale is one a row; ours is one a stored group (``group=0`` is a row). Its loss adds the distance of hidden states and
attention maps to the KL of the outputs; ours is the output's alone. Left out: binary weights, for want of a form that
holds one bit, and the learned scales of 1, 2 and 8 bit activations, which stay at 16 bits; tables are not trained.
Adam with half a cosine, and no labels, as in the paper.

Measured on ``examples/docs-lm``, int8 tables, groups of 64, 32 sequences of 128 tokens, round to nearest at 2 bits, 100
steps, two seeds: the loss on the sequences it trains on falls below the start's, and KL on held-out text rises from
0.426 to 0.553, a negative result. Three levels learn 32 sequences by heart and pay for it elsewhere; with so few the
state that is kept should be chosen on others. The comparison that counts starts from a stored form of three levels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Tuner
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from layerwise.encoding.encoded import Encoded
    from layerwise.tune.scope import Tuned, TunedScope


@technique(
    paper="Ternary_Binary_Transformer",
    left_out="binary weights and the elastic activations",
)
class TernaryBinary(Tuner):
    """Ternary weights with scales from statistics, trained by distillation."""

    scope = "network"

    steps: int = option(100, minimum=0, maximum=1_000_000, help="steps of Adam")
    sequences: int = option(8, minimum=1, maximum=4096, help="sequences a step")
    rate: float = option(0.02, minimum=0, maximum=10, help="of the weights, in levels")

    def touches(self, encoded: Encoded) -> bool:
        from layerwise.encoding.integer import GroupedInteger

        return isinstance(encoded, GroupedInteger) and encoded.grid.bits == 2 and not encoded.grid.float_scale

    def passes(self) -> int:
        return self.steps

    def tune(self, scope: TunedScope) -> Tuned:
        from layerwise.tune._latent import adam
        from layerwise.tune._ternary import ThreeLevels
        from layerwise.tune._training import fit

        return fit(self, scope, ThreeLevels, adam(self.rate))
