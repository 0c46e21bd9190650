"""FireQ's scaling before the rotary embedding: pairs of key channels get the same size, queries take the factors up.

    rotary position turns channels (i, j) of a head together:       n_i = sqrt(E k_i^2 + E k_j^2)
    c_i = (n_i / mean of the head's n)^strength,       W_k rows i, j <- / c_i,       W_q rows i, j <- * c_i

(rows and biases; every query head that reads a key head takes that head's factors). A factor shared by a pair commutes
with the rotation, so ``q . k`` and the network stay what they were; one that is not shared changes the logits, which is
why the usual smoothing of single channels cannot be folded in front of a rotary embedding.

What it is for is keys that are stored in 4 bits with one scale a token and head: pairs that stick out no longer set the
step of the others. For weights it does nothing by itself: a row's scale goes where its groups' steps go, so that
rounding to nearest gives the same codes.

Source: *FireQ: Fast INT4-FP8 Kernel and RoPE-aware Quantization for LLM Inference Acceleration*, arXiv 2505.20839, its
pre-RoPE normalisation. Left open there: its strength (below), and what a pair's size is; root mean squares here, from
the second moments of the inputs, where maxima over tokens are the other reading; the mean of the inputs is not known,
so a bias adds its square alone. The scaling after rotation, of the few channels that still stick out, works on stored
keys at run time and is not here. Heads of which only a part is turned, and norms on queries and keys, are refused by
trial.

Measured on a small language model, nothing rounded but its keys after rotation, one scale a token and head (KL to the
dense network at 4 / 3 / 2 bits, ``benchmarks/rotary_keys.py``): as it is 0.0137 / 0.0791 / 0.782; pairs half equalised
0.0090 / 0.0516 / 0.376; fully 0.0200 / 0.118 / 0.632. The full strength gives away in the queries, which multiply the
error, more than it gains in the keys; hence one half. To weights rounded to nearest it does nothing (its evidence).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from layerwise.errors import InputError
from layerwise.roles import Rewrite
from layerwise.technique import SECOND_MOMENT, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.network.folds import BlockScope
    from layerwise.network.rotary_pairs import RotaryPairs


@technique(paper="FireQ", needs={SECOND_MOMENT})
class FireqRope(Rewrite):
    """Make every rotary pair of a key head as large as the others."""

    strength: float = option(0.5, minimum=0.0, maximum=1.0, help="0 = nothing, 1 = pairs of the same size")
    largest: float = option(100.0, minimum=1.0, help="no pair is scaled by more than this")

    def rewrite(self, scope: BlockScope) -> BlockScope:
        """The scope with every rotary attention scaled; a block without one is refused."""
        if not scope.rotary:
            raise InputError(
                f"fireq_rope finds no queries and keys in {scope.path} whose channels are rotated in pairs; "
                f"leave fireq_rope out for this network"
            )
        for pairs in scope.rotary:
            if pairs.keys in scope.fit:
                scope = scaled(scope, pairs, self.factor(scope, pairs))
        return scope

    def factor(self, scope: BlockScope, pairs: RotaryPairs) -> Tensor:
        """``c`` ``[key heads, width/2]``; 1 for pairs that are always zero."""
        import torch

        size = pairs.over_pairs(key_squares(scope, pairs.keys)).sqrt()
        alive = size > 0
        mean = size.sum(1, keepdim=True) / alive.sum(1, keepdim=True).clamp(min=1)
        ratio = torch.where(alive, size / mean.clamp(min=1e-30), 1.0)
        return ratio.pow(self.strength).clamp(1 / self.largest, self.largest)


def key_squares(scope: BlockScope, keys: str) -> Tensor:
    """``E k^2`` of every key channel, ``[rows]``."""
    weight, inputs = scope.weight(keys), scope.fit[keys].inputs
    squares = weight.square() @ inputs if inputs.dim() == 1 else ((weight @ inputs) * weight).sum(1)
    bias = scope.parameters.get(f"{keys}.bias")
    return squares.clamp(min=0) + (0 if bias is None else bias.square())


def scaled(scope: BlockScope, pairs: RotaryPairs, factor: Tensor) -> BlockScope:
    """The scope with keys divided by a factor for each pair, and queries multiplied."""
    from layerwise.network.folds import scaled as scaled_statistics
    from layerwise.network.rotary_pairs import with_rows_scaled

    channels = pairs.over_channels(factor)
    queries = pairs.over_queries(channels, len(scope.weight(pairs.queries)))
    parameters, fit, judge = dict(scope.parameters), dict(scope.fit), dict(scope.judge)
    for path, rows in ((pairs.keys, 1 / channels), (pairs.queries, queries)):
        parameters |= with_rows_scaled(parameters, path, rows, path in scope.transposed)
        for statistics in (fit, judge):
            if path in statistics:
                statistics[path] = scaled_statistics(statistics[path], rows=1 / rows)
    return replace(scope, parameters=parameters, fit=fit, judge=judge)
