"""FlexRound: every weight is divided by a factor of its own before it is rounded, and the factors are learned.

For a linear with the codes q, steps s and zeros z that an encoder chose, and ``t = 2^b - 1`` the largest code,

    code(L) = clip(round(B / (s' exp(L2 + l3)) + z), 0, t),     W' = (code - z) s',     s' = s exp(l1)

L2 [out, in] is a factor for each weight, l3 [out, 1] one for its row, l1 [out, groups] one for the group's step; all
are logarithms and start at 0. Because they divide, ``d W' / d L2 = -B exp(-L2 - l3)`` inside the grid: the gradient of
a factor grows with its weight, so large weights may move by several levels and small ones stay, and a weight never
changes its sign. ``B`` is the dense weight drawn into the cell of its given code, so that the start is what was given.
One step takes a few sequences x and the dense block's output y and

    minimises  mean (block(x; W') - y)^2   by Adam, with gradients straight through ``round``.

Only codes and steps are stored; L2 and l3 vanish in them. s' is rounded to its stored type before it is used. The state
of the least error over *all* sequences, the start included, is kept.

Source: J. H. Lee et al., "FlexRound: Learnable Rounding based on Element-wise Division for Post-Training
Quantization", arXiv 2306.00317. The paper starts from rounding to nearest on a range found by least error; we start
from the codes of any encoder. Learned are the steps of groups, where the paper has one or one a channel. Rates are of
the logarithms and fall linearly; the paper's (1e-5 .. 5e-3) are for thousands of steps. A convolution's factor of input
channels is left out, since our linears have none, and so is the low-rank L2 of the later LRQ.

Measured on ``examples/docs-lm``, int8 tables, groups of 64, 32 sequences of 128 tokens, round to nearest, 100 steps,
one seed: KL to the dense network on the held-out text 0.427 -> 0.263 at 2 bits (SIGNROUND in as many steps 0.279),
0.0866 -> 0.0651 at 3 bits (SIGNROUND in 200 steps: the same). With rates of 0.004 and 0.001 it is 0.298 at 2 bits: the
paper's rates, made for thousands of steps, are too small for a hundred.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from layerwise.roles import Tuner
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from layerwise.encoding.encoded import Encoded
    from layerwise.tune._division import Divisors
    from layerwise.tune.scope import Tuned, TunedScope


@technique(paper="FlexRound")
class Flexround(Tuner):
    """Learned rounding by element-wise division: Adam on the error of a block's output."""

    steps: int = option(100, minimum=0, maximum=100_000, help="steps of Adam, of each block or of the network")
    sequences: int = option(8, minimum=1, maximum=4096, help="sequences a step")
    rate: float = option(0.01, minimum=0, maximum=1, help="of the logarithms of the factors")
    grid: float = option(0.003, minimum=0, maximum=1, help="rate of the logarithms of the steps; 0 leaves them")
    scope: str = option("block", choices=("block", "network"), help="whose error: each block's, or the network's loss")
    arriving: bool = option(True, help="tune on what arrives behind the stored blocks, not on dense block inputs")

    def touches(self, encoded: Encoded) -> bool:
        from layerwise.encoding.integer import GroupedInteger

        return isinstance(encoded, GroupedInteger) and not encoded.grid.float_scale

    def passes(self) -> int:
        return self.steps

    def tune(self, scope: TunedScope) -> Tuned:
        from layerwise.tune._division import Divisors
        from layerwise.tune._training import Adam, fit

        optimiser = Adam()

        def descend(learned: Mapping[str, Divisors], done: float) -> None:
            left = 1 - done
            pairs = [pair for at in learned.values() for pair in at.rated(self.rate * left, self.grid * left)]
            optimiser.step(pairs)

        return fit(self, scope, Divisors, descend)
