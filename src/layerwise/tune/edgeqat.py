"""EdgeQAT: trained rounding whose loss also keeps attention maps, and the spread of queries and keys, as they were.

The latent weights and steps are those of LSQ: for v [out, in], steps s [out, groups], zeros z, ``t = 2^b - 1``,

    W' = (round(clip(v / s + z, 0, t)) - z) s,      minimise  D(f, f') + maps L_D + entropy L_E

D is the network's own loss between the dense output f and the stored network's f'. Of the queries and keys that both
networks compare (after rotary positions), over layers, sequences and heads, with ``S = Q K^T`` of the pairs that the
mask lets be seen,

    L_D = -ln mean cos(S', S)                                                     zero iff proportional
    L_E = -ln mean ln(1 + min(var(u'), var(u)))                                   u a query or key of one head, [d]

L_E is the entropy of a Gaussian with that variance, with a 1 that keeps a constant vector finite: rounding takes spread
from queries and keys, and with it what their scores can tell apart. The teacher of both is the plan's network with the
matrices that were encoded in place of their stored forms, run beside it. The state of the least D over all sequences,
the start included, is kept. With ``maps=0,entropy=0`` this is LSQ.

Source: X. Shen et al., "EdgeQAT: Entropy and Distribution Guided Quantization-Aware Training for the Acceleration of
Lightweight LLMs on the Edge", arXiv 2402.10787. Its code adds ``ln sum cos``, which drives the maps apart when it is
minimised; ours is what the text says. The cap of the variance at the teacher's is ours (without it the term rewards
queries and keys that grow without end), and so are one cosine for each sequence, the least D instead of the last state,
and D for both of its output losses (labels, and KL at temperature 2): there are no labels. Adam with half a cosine.
**What is open:** activations are not quantized here, neither the inputs of linears nor q, k, v, and so no tokens are
given fewer bits by the attention that they receive from the first one. That is where the paper sees most of the damage
done; what is tuned here is what rounded weights alone do to the maps.

Measured on ``examples/docs-lm``, int8 tables, groups of 64, 32 sequences of 128 tokens, round to nearest, 100 steps,
two seeds: KL to the dense network on held-out text 0.0208 -> 0.0162 at 4 bits, 0.0866 -> 0.0671 at 3, 0.426 -> 0.294
at 2 (SIGNROUND in 200 steps, block by block: 0.0171, 0.0651, 0.277). Against LSQ, at 2 bits and one seed: 0.296 with
both terms and 0.300 without, for a quarter more time; of the 0.427 that rounding costs, the terms give back next to
nothing. So few sequences are learned by heart (their own KL ends at 0.050 either way), and no term on attention
prevents that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from layerwise.roles import Tuner
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from layerwise.encoding.encoded import Encoded
    from layerwise.tune._learned_steps import LearnedSteps
    from layerwise.tune.scope import Tuned, TunedScope


@technique(
    paper="EdgeQAT",
    left_out="quantized activations and bits by token",
)
class Edgeqat(Tuner):
    """Trained rounding that keeps attention maps and the spread of queries and keys: of weights, not of activations."""

    scope = "network"

    steps: int = option(100, minimum=0, maximum=1_000_000, help="steps of Adam")
    sequences: int = option(8, minimum=1, maximum=4096, help="sequences a step")
    rate: float = option(0.01, minimum=0, maximum=10, help="of the weights, in levels")
    grid: float = option(0.002, minimum=0, maximum=1, help="of the steps, as a share of where they started; 0 = fixed")
    maps: float = option(1.0, minimum=0, maximum=1e6, help="share of the attention maps' distance")
    entropy: float = option(0.5, minimum=0, maximum=1e6, help="share of the entropy of queries and keys")

    def touches(self, encoded: Encoded) -> bool:
        from layerwise.encoding.integer import GroupedInteger

        return isinstance(encoded, GroupedInteger) and not encoded.grid.float_scale

    def passes(self) -> int:
        return self.steps

    def tune(self, scope: TunedScope) -> Tuned:
        from layerwise.tune._attention_terms import attended_loss
        from layerwise.tune._latent import adam
        from layerwise.tune._learned_steps import LearnedSteps
        from layerwise.tune._training import fit

        share = self.grid / self.rate if self.rate else 0.0

        def backward(learned: Mapping[str, LearnedSteps], part: int) -> None:
            weights = {path: at.weight() for path, at in learned.items()}
            attended_loss(scope, weights, part, self.maps, self.entropy).backward()  # type: ignore[no-untyped-call]

        return fit(self, scope, lambda form, weight: LearnedSteps(form, weight, share), adam(self.rate), backward)
