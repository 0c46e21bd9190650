"""RepQuant, part C: the static range of a linear's inputs is clipped where its output is best.

    lo = l min x,   hi = h max x,   l, h in {1, 0.95, ... 0.05}:      least  || (x' - x) W^T ||^2  over a sample of x
    s = (hi - lo) / (2^bits - 1),   z = round(-lo / s),               x' = s (clip(round(x / s) + z) - z)

One scale and zero for the tensor: what part A, the rewrite ``repquant``, makes of a scale for each channel behind a
norm (``repquant+rtn``, then these activations). Both ends are clipped apart ("dual"), in turn, until neither moves.

Source: Li et al., *RepQuant*, arXiv 2402.05628. Left open there: the schedule (learning rates and steps of two
sigmoids for each channel); here the two ends of the tensor are searched, which needs no schedule and is the same on
every machine. The sample is 256 calibration tokens through the stored network. Weights are rounded by the recipe's own
encoder, so the reconstruction of part C is left out, and so is part B, the base sqrt(2) logarithm of attention
probabilities: nothing here multiplies those as integers.

Measured on a small language model with 8-bit weights (its evidence; KL to the dense network at 8 / 6 / 4 bits): the
whole range 0.0085 / 0.113 / 0.971, clipped 0.0061 / 0.0495 / 0.367: at 6 and 4 bits clipping takes more than half of
the loss away. Eight groups of channels (``dgq``) are better still there, and one dynamic scale a token everywhere
(0.0013 / 0.0169 / 0.194). Part A hardly helps on this network: with ``repquant`` before the weights and one whole range
at 6 bits the loss is 0.112 instead of 0.118 (one seed).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import ActivationQuantizer
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.input_ranges import InputRanges
    from layerwise.encoding.encoded import Layout
    from layerwise.encoding.inputs import GroupGrid, InputGrid

MOST_ROUNDS = 10


@technique(paper="RepQuant")
class RepquantClip(ActivationQuantizer):
    """Static asymmetric integers with one scale, both ends clipped for the least error of the output."""

    static = True
    bits: int = option(8, minimum=2, maximum=8, help="bits per input")
    steps: int = option(20, minimum=1, maximum=100, help="places tried at each end")

    def grid(self, ranges: InputRanges | None) -> InputGrid:
        assert ranges is not None
        shares = [1 - i / self.steps for i in range(self.steps)]
        best, least = (1.0, 1.0), self._error(ranges, 1.0, 1.0)
        for _ in range(MOST_ROUNDS):
            before = best
            for end in (0, 1):
                for share in shares:
                    tried = (share, best[1]) if end == 0 else (best[0], share)
                    error = self._error(ranges, *tried)
                    if error < least:
                        best, least = tried, error
            if best == before:
                break
        return self._clipped(ranges, *best)

    def layout(self, columns: int) -> Layout:
        from layerwise.encoding.inputs import group_layout

        return group_layout(columns, 1)

    def _clipped(self, ranges: InputRanges, low: float, high: float) -> GroupGrid:
        import torch

        from layerwise.encoding.inputs import GroupGrid

        ends = low * ranges.low.amin().clamp(max=0)[None], high * ranges.high.amax().clamp(min=0)[None]
        return GroupGrid.between(*ends, torch.zeros(len(ranges.low), dtype=torch.uint8), self.bits)

    def _error(self, ranges: InputRanges, low: float, high: float) -> float:
        change: Tensor = self._clipped(ranges, low, high).quantize(ranges.sample).values() - ranges.sample
        if ranges.weight is not None:
            change = change @ ranges.weight.T
        return float(change.double().square().sum())
