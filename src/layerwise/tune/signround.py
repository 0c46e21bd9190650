"""SIGNROUND: which way every weight is rounded, and how far every group reaches, learned by the sign of the gradient.

For a linear with the codes q, steps s and zeros z that an encoder chose, and ``t = 2^b - 1`` the largest code,

    code(V, a, c) = clip(round(B / s' + z' + V), 0, t),      W' = (code - z') s'
    s' = s (a (t - z) + c z) / t,    z' = round(c z s / s')         (symmetric: s' = a s, z' = z)

V [out, in] moves each weight by at most half a level and starts at 0; a and c [out, groups] move the upper and lower
end of each group's range and start at 1. ``B`` is the dense weight, drawn into the cell of its given code where an
encoder chose another than the nearest one, so that the start is exactly what was given: codes of GPTQ or TWO-SIDED
are continued, not thrown away. One step takes a few sequences x and the dense block's output y,

    minimise  mean (block(x; W') - y)^2,      (V, a, c) -= rate_k sign(gradient),    rate_k = rate (1 - k / steps),

with gradients straight through ``round`` and, inside the grid, ``clip``. s' and z' are rounded to their stored types
before they are used, so the loss is that of what is stored. The state of the least error over *all* sequences, the
start included, is kept.

Source: W. Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs"
(AutoRound), arXiv 2309.05516. The paper starts from rounding to nearest. Choices of ours: the start from given codes;
range factors 0.5 to 1.2 instead of 0 to 1, as a clip-searched range may have been cut too far; the least error is
looked for on all sequences every tenth of the steps instead of on single batches.

Measured on ``examples/docs-lm``, int8 tables, groups of 64, 32 sequences of 128 tokens: KL to the dense
network on 64 held-out sequences, without -> with 100 steps:

    2 bits   rtn 0.428 -> 0.247    gptq 0.346 -> 0.256    two_sided 0.309 -> 0.246
    3 bits   rtn 0.0866 -> 0.0598  gptq 0.0661 -> 0.0641  two_sided 0.0580 -> 0.0607
    2 bits, arriving=false (dense block inputs):          rtn 0.282, two_sided 0.274
    3 bits, ranges=false:                                 two_sided 0.0586
    3 bits, 96 sequences, other 96 held out:              two_sided 0.0525 -> 0.0525

So it is worth a fifth to two fifths of the KL at 2 bits, where its start hardly matters; at 3 bits it mends rounding to
nearest and does a two-sided plan no good: its share of words that agree with the dense network's falls, 0.857 to 0.844
(0.855 to 0.849 with 96 sequences). Presumably because the block's squared error knows nothing of the loss by which
those codes were chosen; that was not tested. Perplexity fell in every case.

``scope=network`` takes the same steps on the whole network's loss, here the KL itself. 32 sequences are far too few for
that: 100 steps at 2 bits from rounding to nearest took their KL from 0.427 to 0.048 and that of the held-out text to
0.297, where block scope reached 0.279. One seed each:
``layerwise compress examples/docs-lm OUT --uniform two_sided:bits=2,group=64 --embeddings int8 --tune
signround:steps=100 --sequences 32 --length 128 --threads 1 --calibrate examples/docs_calibrate.txt --evaluate
examples/docs_heldout.txt``
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from layerwise.roles import Tuner
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from layerwise.encoding.encoded import Encoded
    from layerwise.tune._rounding import Offsets
    from layerwise.tune.scope import Tuned, TunedScope


@technique(paper="SIGNROUND")
class Signround(Tuner):
    """Learned rounding: signed gradient steps on the error of a block's output."""

    steps: int = option(200, minimum=0, maximum=100_000, help="signed gradient steps, of each block or of the network")
    sequences: int = option(8, minimum=1, maximum=4096, help="sequences a step")
    rate: float = option(0.0, minimum=0, maximum=1, help="first step, in levels; 0 = 1 / steps")
    ranges: bool = option(True, help="learn how far each group reaches, not only the rounding")
    scope: str = option("block", choices=("block", "network"), help="whose error: each block's, or the network's loss")
    arriving: bool = option(True, help="tune on what arrives behind the stored blocks, not on dense block inputs")

    def touches(self, encoded: Encoded) -> bool:
        from layerwise.encoding.integer import GroupedInteger

        return isinstance(encoded, GroupedInteger) and not encoded.grid.float_scale

    def passes(self) -> int:
        return self.steps

    def tune(self, scope: TunedScope) -> Tuned:
        from layerwise.tune._rounding import Offsets
        from layerwise.tune._training import fit

        rate = self.rate or 1.0 / max(1, self.steps)

        def descend(learned: Mapping[str, Offsets], done: float) -> None:
            for at in learned.values():
                at.descend(rate * (1 - done))

        return fit(self, scope, lambda form, weight: Offsets(form, weight, self.ranges), descend)
