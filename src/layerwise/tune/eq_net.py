"""EQ-Net: one set of latent weights is trained under every width at once, and the plan's widths are taken out of it.

For a linear with latent weight v [out, in] and, for each width b of ``lowest`` .. ``highest``, steps s_b [out, groups]
and zeros z_b of that width's own grid, with ``t_b = 2^b - 1``,

    W'_b = (round(clip(v / s_b + z_b, 0, t_b)) - z_b) s_b        v shared, s_b learned for each width (as in LSQ)

A step trains three networks on the same few sequences, each a choice of one width for every linear, and adds up their
gradients:

    all at ``highest`` bits        taught by the dense network f:   D(f, y1)
    a width drawn for each linear  and by the one before:          (D(f, y2) + D(y1, y2)) / 2
    all at ``lowest`` bits         and by the one before:          (D(f, y3) + D(y2, y3)) / 2

with D the network's own loss (KL, or squared distance of vectors), its first argument held fixed; and, because a
flat distribution is what few levels of any width represent best, ``shape`` times

    0.015 mean_l (kurtosis(v_l) - 1.8)^2 + mean_l skewness(v_l)^2          1.8: a uniform distribution

Stored is what the plan chose: codes and steps at each linear's own width, which is always among those trained. The
state whose *plan* has the least loss over all sequences is kept, the start included.

Source: K. Xu et al., "EQ-Net: Elastic Quantization Neural Networks", arXiv 2308.07650. **What is open of it:** elastic
here is the width of weights. Symmetry and the groups are those of the given form, where the paper trains rows and whole
layers, symmetric and not, side by side; activations stay at 16 bits. The latents end with the tuning: other widths need
another one, and the genetic search with its learned predictor of accuracy is not here (the planner's measured damages
take its place). Choices of ours: the start is what an encoder gave, not a float network; the dense network's output
stands for labels; the zeros are not learned; grids of other widths start from a search over clipped ranges by squared
error; Adam divides a gradient's size out, so that gradients are not clipped by value. No norm of ours counts batches,
so nothing is calibrated again.

Measured on ``examples/docs-lm``, int8 tables, groups of 64, 32 sequences of 128 tokens, round to nearest, 30 steps, two
seeds: KL to the dense network on held-out text 0.426 -> 0.338 at 2 bits; at 3 and 4 bits no state was better than the
start on the sequences it trains on, so the start was kept. One set of latents at all widths, one seed, the state after
the last step, beside rounding to nearest at equal bytes:

    bits                          2        3        4        8
    round to nearest              0.427    0.0866   0.0210   0.00015
    tuned on a plan of 2 bits     0.340    0.119    0.0590   0.0445
    tuned on a plan of 4 bits     0.372    0.0970   0.0309   0.0140

A negative result: what is learned in a few steps serves the fewest bits and is paid for by all others, 8 bits most,
where rounding alone costs nothing. The penalty is not to blame: with ``shape=0`` nothing better than the start
was found at 3 bits either. The paper trains for 120 epochs. For one plan LSQ, with as many passes, is better (0.300 at
2 bits).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from layerwise.errors import InputError
from layerwise.roles import Tuner
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.encoding.encoded import Encoded
    from layerwise.tune._elastic import Elastic
    from layerwise.tune.scope import Tuned, TunedScope


SANDWICH = 3  # networks a step


@technique(
    paper="EQ-Net",
    left_out="activations, symmetry and granularity, the genetic search and its predictor",
)
class EqNet(Tuner):
    """One set of latent weights trained under all widths at once, of which the plan's are stored; no activations."""

    scope = "network"

    steps: int = option(30, minimum=0, maximum=1_000_000, help="steps of Adam, of three networks each")
    sequences: int = option(8, minimum=1, maximum=4096, help="sequences a step")
    rate: float = option(0.01, minimum=0, maximum=10, help="of the weights, in levels of the plan's grid")
    grid: float = option(0.002, minimum=0, maximum=1, help="of the steps, as a share of where they started; 0 = fixed")
    lowest: int = option(2, minimum=2, maximum=8, help="the fewest bits that are trained")
    highest: int = option(8, minimum=2, maximum=8, help="the most bits that are trained")
    shape: float = option(1.0, minimum=0, maximum=1e6, help="share of the penalty on kurtosis and skewness")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.highest < self.lowest:
            raise InputError(f"highest must be at least lowest, {self.lowest} bits, not {self.highest}")

    def touches(self, encoded: Encoded) -> bool:
        from layerwise.encoding.integer import GroupedInteger

        return isinstance(encoded, GroupedInteger) and not encoded.grid.float_scale

    def passes(self) -> int:
        return SANDWICH * self.steps

    def tune(self, scope: TunedScope) -> Tuned:
        import torch

        from layerwise.tune._elastic import Elastic, sandwich, shape_penalty
        from layerwise.tune._latent import adam
        from layerwise.tune._training import fit

        share = self.grid / self.rate if self.rate else 0.0
        drawn = torch.Generator().manual_seed(scope.seed + 1)

        def backward(learned: Mapping[str, Elastic], part: int) -> None:
            sandwich(scope, learned, part, drawn)
            if self.shape:
                penalty = self.shape * shape_penalty(at.latent() for at in learned.values())
                penalty.backward()  # type: ignore[no-untyped-call]

        widths = range(self.lowest, self.highest + 1)

        def learn(form: Encoded, weight: Tensor) -> Elastic:
            return Elastic(form, weight, widths, share)

        return fit(self, scope, learn, adam(self.rate), backward, SANDWICH)
