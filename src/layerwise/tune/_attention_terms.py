"""What rounding does to attention, as terms of a loss: maps that differ, queries and keys that lose spread.

See ``tune.edgeqat``. Attention is watched where every network calls it (``calibrate.attention``), so queries and keys
are those that are compared, after rotary positions, with this network's mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from layerwise.calibrate.attention import Attention, watching_attention
from layerwise.errors import InputError
from layerwise.tune.network import TunedNetwork
from layerwise.tune.scope import TunedScope

LEAST = 1e-3  # a mean cosine below it has no gradient


def scores(call: Attention) -> Tensor:
    """Scores before the softmax, without the scale and the mask: [sequences, heads, T, T]."""
    query, key = call.query.float(), call.key.float()
    return query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(-1, -2)


def pairs(call: Attention) -> Tensor:
    """Bool [sequences, 1 or heads, T, T]: the pairs whose score counts; padding neither asks nor is asked."""
    count, length = call.query.shape[0], call.query.shape[2]
    seen = torch.ones(length, call.key.shape[2], dtype=torch.bool, device=call.query.device)
    if call.causal:
        seen = seen.tril()
    seen = seen.expand(count, 1, -1, -1)
    if call.mask is not None:
        mask = call.mask if call.mask.dtype == torch.bool else call.mask > torch.finfo(call.mask.dtype).min / 2
        seen = seen & mask
    counted = seen.any(-2)  # [sequences, 1 or heads, T]: a token that nobody may see is padding
    return seen & counted[..., None]


def map_distance(mine: Sequence[Attention], theirs: Sequence[Attention]) -> Tensor:
    """``-ln`` of the mean cosine between the scores of both, over layers, sequences and heads."""
    cosines = []
    for own, other in zip(mine, theirs, strict=True):
        counts = pairs(other)
        a, b = ((scores(call) * counts).flatten(2) for call in (own, other))
        cosines.append(torch.nn.functional.cosine_similarity(a, b, dim=-1).flatten())
    return -torch.cat(cosines).mean().clamp(min=LEAST).log()


def spread_loss(mine: Sequence[Attention], theirs: Sequence[Attention]) -> Tensor:
    """``-ln`` of the mean of ``ln(1 + var)`` over layers, heads and tokens of queries and keys.

    A variance [sequences, heads, T] counts up to the dense network's own, so that it is not worth inflating.
    """
    terms = []
    for own, other in zip(mine, theirs, strict=True):
        tokens = pairs(other).any(-2).any(1)[:, None]  # [sequences, 1, T]
        for now, then in ((own.query, other.query), (own.key, other.key)):
            variance = torch.minimum(now.float().var(-1), then.float().var(-1))
            terms.append(variance.log1p()[tokens.expand_as(variance)])
    return -torch.cat(terms).mean().clamp(min=LEAST).log()


def attended_loss(scope: TunedScope, weights: Mapping[str, Tensor], part: int, maps: float, entropy: float) -> Tensor:
    """The scope's mean loss on a part, and both terms against the scope with its dense matrices.

    Raises ``InputError`` for a network that calls no attention.
    """
    assert isinstance(scope, TunedNetwork)
    target, wanted = scope.target(part), maps > 0 or entropy > 0
    with watching_attention(wanted) as mine:
        found = scope.forward(weights, part)
    losses = scope.distances(target, found)
    mean = losses.sum() / len(losses)
    if not wanted:
        return mean
    if not mine:
        raise InputError(
            "edgeqat tunes towards attention maps, and this network has no attention that can be seen; use --tune lsq"
        )
    with torch.no_grad(), watching_attention(True) as theirs:
        scope.forward({path: scope.weights[path] for path in weights}, part)
    if maps:
        mean = mean + maps * map_distance(mine, theirs)
    return mean + entropy * spread_loss(mine, theirs) if entropy else mean
