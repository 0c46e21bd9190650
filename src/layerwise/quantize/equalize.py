"""Cross-layer equalisation: a matrix and the one that reads it get channels of the same range.

    W_1 row i has range r_i, W_2 column i has range t_i (largest absolute weights):   s_i = sqrt(r_i / t_i)
    W_1 <- diag(1/s) W_1,   b_1 <- b_1 / s,   W_2 <- W_2 diag(s)                      both ranges are then sqrt(r_i t_i)

Exact where what lies between the two hands a positive factor through: the value projection and the output projection
of an attention with as many value heads as query heads, the up and the down projection of a gated MLP, a ReLU. Which
pairs these are is tried out (``network/folds.py``). Norms are not pairs: a norm's gain is not rounded.

It needs no data. Where a row's range is shared by the whole row (``group=0``) the rows that stick out of W_1 cost
nothing any more, but in W_2 the columns stick out instead, and in groups of 64 W_1's rows had scales of their own.

Source: Nagel et al., *Data-Free Quantization Through Weight Equalization and Bias Correction*, arXiv 1906.04721,
section 4.1. Left open there: which networks but chains of ReLU layers it serves; the pairs found here share no channel,
so that one pass is the fixed point and nothing is iterated. Bias absorption and correction, which are not exact, are
left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.errors import InputError
from layerwise.roles import Rewrite
from layerwise.technique import technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.network.folds import BlockScope, Fold

LARGEST = 1e4  # factor; a channel that is almost zero on one side is not pushed further


@technique(paper="DFQ")
class Equalize(Rewrite):
    """Give both sides of every channel between two matrices the same range."""

    def rewrite(self, scope: BlockScope) -> BlockScope:
        """The scope with every pair equalised; a block without one is refused."""
        pairs = [fold for fold in scope.folds if scope.parameters[f"{fold.producer}.weight"].dim() == 2]
        if not pairs:
            raise InputError(
                f"equalize finds no two matrices in {scope.path} between which a factor per channel is handed through; "
                f"leave equalize out for this network"
            )
        for fold in pairs:
            scope = scope.folded(fold, equalising(scope, fold))
        return scope


def equalising(scope: BlockScope, fold: Fold) -> Tensor:
    """``s`` ``[channels]``; 1 where one of the sides is zero."""
    import torch

    before = scope.weight(fold.producer).abs().amax(1)
    after = torch.stack([scope.weight(consumer).abs().amax(0) for consumer in fold.consumers]).amax(0)
    alive = (before > 0) & (after > 0)
    ratio = torch.where(alive, before, 1.0) / torch.where(alive, after, 1.0)
    return ratio.sqrt().clamp(1 / LARGEST, LARGEST)
