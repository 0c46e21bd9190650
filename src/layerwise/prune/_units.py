"""From scores of heads and channels to the network without the lowest: what structured pruning techniques share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from layerwise.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.network.network import Network
    from layerwise.network.widths import Width

DAMP = 1e-3  # share of the mean diagonal of E[x x^T] added to it before it is inverted


def widths_of(network: Network, asker: str, heads: float, channels: float) -> dict[str, tuple[Width, int]]:
    """Kind -> (width, how many units go), for the kinds of which any go.

    Raises ``InputError`` for a share that removes nothing of what it is a share of.
    """
    from layerwise.network.widths import channels_of, heads_of

    found = {}
    for kind, share, find in (("heads", heads, heads_of), ("channels", channels, channels_of)):
        if share == 0:
            continue
        width = find(network)
        count = width.removed(share)
        if count == 0:
            least = 0.5 / width.units
            raise InputError(
                f"{asker}:{kind}={share} removes none of {width.units} {kind} a block of {network.name}; "
                f"the smallest share that does is {least:.2g}"
            )
        found[kind] = (width, count)
    return found


def best_units(scores: Tensor, removed: int) -> Tensor:
    """Indices of all but the ``removed`` lowest scores [units], rising; of equals the first stay."""
    import torch

    order = torch.sort(scores, descending=True, stable=True).indices
    return torch.sort(order[: len(scores) - removed]).values


def refitted(moment: Tensor, entries: Tensor) -> Tensor:
    """``C_:S (C_SS + d I)^-1`` float32 [n, kept]: what the kept inputs S say of all, by least squares.

    moment: C = E[x x^T], float64. ``W x`` is then nearest to ``(W mixed) x_S``; kept entries stay what they are.
    """
    import torch

    inner = moment[entries][:, entries]
    inner = inner + DAMP * inner.diagonal().mean().clamp_min(1e-30) * torch.eye(len(entries), dtype=inner.dtype)
    gone = torch.ones(len(moment), dtype=torch.bool)
    gone[entries] = False
    mixed = torch.zeros(len(moment), len(entries), dtype=moment.dtype)
    mixed[entries, torch.arange(len(entries))] = 1.0
    mixed[gone] = torch.cholesky_solve(moment[entries][:, gone], torch.linalg.cholesky(inner)).T
    return mixed.float()


def cut(
    network: Network,
    widths: Mapping[str, tuple[Width, int]],
    scores: Mapping[str, Mapping[str, Tensor]],
    moments: Mapping[str, Tensor],
) -> Network:
    """The network of the best units. scores: kind -> block -> [units]; moments: reader -> E[x x^T], where refitted."""
    from layerwise.network.widths import without_units

    kept, mixed = {}, {}
    for kind, (width, removed) in widths.items():
        blocks = {block: best_units(found, removed) for block, found in scores[kind].items()}
        kept[kind] = (width, blocks)
        for block, units in blocks.items():
            reader = width.readers[block]
            if reader in moments:
                mixed[reader] = refitted(moments[reader], width.entries(units, len(moments[reader])))
    return without_units(network, kept, mixed)
