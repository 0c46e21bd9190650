"""Statistics of experts: measured on the tokens that were sent to them, borrowed where there were none.

An expert's share of the damage is ``n_site / n_loss`` like any site's, so a rare expert counts by its rarity. One that
no calibration token reached is not a site that the loss does not depend on: it is a site that was not measured. It is
taken for an average expert of its layer about which no direction is known, reached by a single token:

    R = mean(diag R') I,   C = mean(diag C') I,   scale * rows * columns = sum_e scale_e tr R_e tr C_e / sum_e tokens_e

with the sums and means over the measured experts ``e`` of the layer, same matrix. Its damage is then that of rounding
without statistics, at the weight of the next token that might come.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerwise.calibrate.reverse import SplitMoments
from layerwise.calibrate.statistics import SiteStatistics, Use, diagonal, mean_diagonal
from layerwise.network.sites import Site


def expert_statistics(sites: Sequence[Site], moments: SplitMoments, constant: float) -> dict[str, SiteStatistics]:
    """Statistics of a block's experts on one split; nothing for a layer that no gradient reached."""
    measured = {s.name: moments.statistics(s.name, constant) for s in sites if is_measured(s.name, moments)}
    return with_average(sites, measured)


def is_measured(name: str, moments: SplitMoments) -> bool:
    watched = moments.sites.get(name)
    if watched is None or not watched.inputs.count or watched.right is None:
        return False
    return float(diagonal(watched.right).max()) > 0


def with_average(sites: Sequence[Site], measured: dict[str, SiteStatistics]) -> dict[str, SiteStatistics]:
    """``measured``, and the average of its layer for every expert that is not in it."""
    groups: dict[tuple[str | None, str], list[str]] = {}
    for site in sites:
        groups.setdefault((site.experts, site.name.rpartition(".")[2]), []).append(site.name)
    out: dict[str, SiteStatistics] = {}
    for names in groups.values():
        uses = [measured[n].uses[0] for n in names if n in measured]
        average = SiteStatistics((average_use(uses),)) if uses and len(uses) < len(names) else None
        for name in names:
            if name in measured:
                out[name] = measured[name]
            elif average is not None:
                out[name] = average
    return out


def average_use(uses: Sequence[Use]) -> Use:
    """What is known of an expert from the others of its layer; see above. No token was measured."""
    rows, columns, inputs = (alike([getattr(u, side) for u in uses]) for side in ("rows", "columns", "inputs"))
    total = sum(u.scale * mean_diagonal(u.rows) * mean_diagonal(u.columns) for u in uses)
    size = mean_diagonal(rows) * mean_diagonal(columns) * sum(u.tokens for u in uses)
    absolute = torch.stack([u.absolute_mean for u in uses]).mean().expand(len(uses[0].absolute_mean)).clone()
    return Use(rows, columns, inputs, absolute, total / size if size > 0 else 0.0, 0)


def alike(sides: Sequence[Tensor]) -> Tensor:
    """The sides' mean diagonal in every direction, in their own shape."""
    out = torch.zeros_like(sides[0])
    diagonal(out).fill_(sum(map(mean_diagonal, sides)) / len(sides))
    return out


def borrowed(
    name: str, fit: dict[str, SiteStatistics], judge: dict[str, SiteStatistics]
) -> tuple[SiteStatistics, SiteStatistics]:
    """(fit, judge) of an expert in one of them at least: where a whole layer was left out of a split, the other's."""
    return (fit if name in fit else judge)[name], (judge if name in judge else fit)[name]
