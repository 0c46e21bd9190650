"""RepQuant, part A: a scale per channel behind a norm becomes one scale, exactly.

    y = x_hat * g + b, channel c in [lo_c, hi_c]:     s_c = (hi_c - lo_c) / (2^bits - 1),    z_c = -round(lo_c / s_c)
    s = mean s_c,   z = round(mean z_c),   r = s_c / s,   k = z_c - z
    g <- g / r,   b <- (b + s_c k) / r,     readers:  W <- W diag(r),   c <- c - W (s_c k)

The codes of the new activation under the one (s, z) are those of the old one under its own (s_c, z_c), and without any
rounding the network is the same function: ``reparametrised``.

As a rewrite of a block it uses the symmetric form, k = 0, which RMSNorms need (they have no bias) and which moves
nothing but scales; s_c is the channel's root mean square, whose multiple (how many deviations are kept) cancels in r.
What it is for is activations at 8 bits and fewer. To the weights alone it does the opposite of AWQ: columns of large
inputs grow, and the rounding of a row sees them: on docs-lm KL at 4 / 3 / 2 bits in groups of 64 rises from 0.0208 /
0.0866 / 0.426 to 0.0223 / 0.0941 / 0.459. Where activations are rounded per token or not at all, leave it out.

Source: Li et al., *RepQuant*, arXiv 2402.05628, its part A as in RepQ-ViT, arXiv 2212.08254. Left open there: what a
range is (second moments here, as the blocks' statistics know no smallest and largest), channels that are always zero
(factor 1). Parts B (softmax) and C (clipping, reconstruction) round activations and are not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerwise.errors import InputError
from layerwise.roles import Rewrite
from layerwise.technique import SECOND_MOMENT, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.network.folds import BlockScope, Fold


@technique(
    paper="RepQuant",
    needs={SECOND_MOMENT},
    left_out="the shift of asymmetric ranges, the grid of attention maps, reconstructed weights",
)
class Repquant(Rewrite):
    """Make every channel behind a norm as wide as the others, by the norm's gain and the columns that read it."""

    largest: float = option(100.0, minimum=1.0, help="no channel is scaled by more than this")

    def rewrite(self, scope: BlockScope) -> BlockScope:
        """The scope with one scale behind every norm that only linears read; a block without one is refused."""
        folds = [fold for fold in scope.folds if scope.parameters[f"{fold.producer}.weight"].dim() == 1]
        if not folds:
            raise InputError(
                f"repquant finds no norm in {scope.path} that linears alone read; leave repquant out for this network"
            )
        for fold in folds:
            factor = self.factor(scope, fold)
            if factor is not None:
                scope = scope.folded(fold, factor)
        return scope

    def factor(self, scope: BlockScope, fold: Fold) -> Tensor | None:
        """``r`` ``[channels]`` from the second moments of a consumer's inputs; None where they are not known."""
        from layerwise.calibrate.statistics import diagonal

        known = [consumer for consumer in fold.consumers if consumer in scope.fit]
        if not known:
            return None
        return ratios(diagonal(scope.fit[known[0]].inputs).clamp(min=0).sqrt(), self.largest)


def ratios(steps: Tensor, largest: float = float("inf")) -> Tensor:
    """``r = s_c / s``, 1 for channels that are always zero."""
    import torch

    alive = steps > 0
    if not bool(alive.any()):
        return torch.ones_like(steps)
    return torch.where(alive, steps / steps[alive].mean(), 1.0).clamp(1 / largest, largest)


@dataclass(frozen=True)
class Reparametrised:
    """A norm's gain and bias, its readers' (weight, bias), and the one step and zero of its activation."""

    gain: Tensor
    bias: Tensor
    readers: tuple[tuple[Tensor, Tensor], ...]
    step: float
    zero: int


def reparametrised(
    gain: Tensor, bias: Tensor, readers: Sequence[tuple[Tensor, Tensor]], low: Tensor, high: Tensor, bits: int
) -> Reparametrised:
    """The whole of part A: channels in ``[low, high]``, readers ``(W [out, channels], c [out])``.

    Raises ``InputError`` for a range that is none.
    """
    if not bool((high > low).all()):
        raise InputError("every channel needs a range, low below high")
    steps, zeros = channel_grid(low, high, bits)
    factor = ratios(steps)
    zero = zeros.mean().round()
    shift = steps * (zeros - zero)
    return Reparametrised(
        gain / factor,
        (bias + shift) / factor,
        tuple((weight * factor, own - weight @ shift) for weight, own in readers),
        float(steps.mean()),
        int(zero),
    )


def channel_grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(step, whole zero) of each channel's asymmetric grid."""
    steps = (high - low) / (2**bits - 1)
    return steps, (-low / steps).round()
