"""DGQ's groups for the inputs of linears: channels of like range share a scale that was measured beforehand.

    channel c spans [lo_c, hi_c] on the calibration text;      k-means with k centres on the points (lo_c, hi_c)
    group g spans [min lo_c, max hi_c] of its members:         s_g = (hi - lo) / (2^bits - 1),   z_g = round(-lo / s_g)
    q_tc = clip(round(x_tc / s_g) + z_g, 0, 2^bits - 1),       x'_tc = s_g (q_tc - z_g)

A few channels with large values then have a scale of their own instead of taking the steps of all others. ``groups=1``
is the usual static grid of the whole tensor, ``groups=0`` a grid for every channel. What a linear stores is k scales
and zeros and one byte a channel. k-means starts from centres at equal ranks of the ranges' widths, so that the groups
are the same on every machine, and runs until they stay.

Source: *DGQ: Distribution-Aware Group Quantization for Text-to-Image Diffusion Models*, arXiv 2501.04304, and its
public code. What a language model or an encoder does not have is left out: parameters per time step, and groups of
positions (pixels), which need inputs of one length; ``spreads`` says which of the two axes the paper's rule would take.
The logarithmic grid of its cross-attention maps is left out too: nothing here multiplies attention maps as integers.
Ranges hold zero, as the paper's pitfall asks; an empty cluster keeps its centre and is never used.

Measured on a small language model with 8-bit weights (its evidence; KL to the dense network at 8 / 6 / 4 bits): one
scale 0.0085 / 0.113 / 0.971, 8 groups 0.0083 / 0.0287 / 0.280; at 4 bits 2 groups 0.625, 16 groups 0.232. The paper's
claim holds below 8 bits: a few groups take three quarters of the loss away. At 8 bits they clip: ranges of few channels
meet values on other text that they have not seen (with dense weights 0.0026 by calibrated ranges, 0.0013 by those of
the held-out text itself), and how much differs threefold between calibration seeds. One dynamic scale a token, which
stores nothing, is better everywhere (0.0013 / 0.0169 / 0.194): groups are for hardware that must know its scales.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.errors import InputError
from layerwise.roles import ActivationQuantizer
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.input_ranges import InputRanges
    from layerwise.encoding.encoded import Layout
    from layerwise.encoding.inputs import InputGrid

MOST_GROUPS = 256
MOST_ROUNDS = 100


@technique(
    paper="DGQ",
    menu=("bits=8,groups=8", "bits=6,groups=8", "bits=4,groups=8", "bits=4,groups=2", "bits=4,groups=16"),
    left_out="groups of positions and the logarithmic grid of cross-attention",
)
class Dgq(ActivationQuantizer):
    """Static asymmetric integers, one scale for each group of channels of like range."""

    static = True
    bits: int = option(8, minimum=2, maximum=8, help="bits per input")
    groups: int = option(8, minimum=0, maximum=256, help="groups of channels; 1 = the whole tensor, 0 = each channel")

    def grid(self, ranges: InputRanges | None) -> InputGrid:
        import torch

        from layerwise.encoding.inputs import GroupGrid

        assert ranges is not None
        low, high = ranges.low.float(), ranges.high.float()
        count = self._count(len(low))
        if count == len(low):
            return GroupGrid.between(low, high, torch.arange(count), self.bits)
        group = clusters(torch.stack([low, high], 1), count)
        ends = [torch.zeros(count) for _ in range(2)]
        ends[0].scatter_reduce_(0, group, low, "amin")
        ends[1].scatter_reduce_(0, group, high, "amax")
        return GroupGrid.between(ends[0], ends[1], group, self.bits)

    def layout(self, columns: int) -> Layout:
        from layerwise.encoding.inputs import group_layout

        return group_layout(columns, self._count(columns))

    def _count(self, columns: int) -> int:
        if self.groups == 0 and columns > MOST_GROUPS:
            raise InputError(
                f"dgq:groups=0 asks for a scale for each of {columns} channels, and it has at most {MOST_GROUPS}; "
                f"give groups=16"
            )
        return min(self.groups or columns, columns)


def clusters(points: Tensor, count: int) -> Tensor:
    """k-means on ``points`` ``[n, 2]``: the cluster of each, int64 ``[n]``. ``count`` at most n."""
    import torch

    points = points.double()
    points = points / points.abs().amax().clamp(min=1e-300)  # squares of huge ranges stay finite
    order = (points[:, 1] - points[:, 0]).argsort(stable=True)
    ranks = torch.linspace(0, len(points) - 1, count).round().long()
    centres = points[order[ranks]]
    group = torch.full((len(points),), -1)
    for _ in range(MOST_ROUNDS):
        nearest = (points[:, None] - centres[None]).square().sum(-1).argmin(1)
        if torch.equal(nearest, group):
            break
        group = nearest
        sizes = torch.zeros(count, dtype=torch.float64).index_add_(0, group, torch.ones(len(points)).double())
        sums = torch.zeros_like(centres).index_add_(0, group, points)
        centres = torch.where(sizes[:, None] > 0, sums / sizes[:, None].clamp(min=1), centres)
    return group


def spreads(ranges: InputRanges) -> tuple[float, float]:
    """How far ranges lie apart among channels and among positions: the paper groups the axis with the larger figure."""

    def spread(low: Tensor, high: Tensor) -> float:
        return float(high.max() - high.min() + low.max() - low.min()) if len(low) else 0.0

    return spread(ranges.low, ranges.high), spread(ranges.position_low, ranges.position_high)
