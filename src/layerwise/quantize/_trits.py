"""Scales of one plane of trits, and trits as places among levels: what every ternary technique shares."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.encoding.grid import CHUNK, relative_importance
from layerwise.encoding.scales import by_group, groups_of

SCALES = ("mse", "absmean", "statistics")
STATISTICS = 4.0 / 3.0  # times mean |w|: three levels equally likely where weights are evenly spread


def trit_scales(weight: Tensor, group: int, kind: str, importance: Tensor) -> Tensor:
    """The scale of each group, float32 [rows, groups].

    ``absmean`` is mean |w|, ``statistics`` 4/3 of it, ``mse`` the scale of least ``sum_j h_j (w_j - a t_j)^2`` with
    ``h = importance`` [columns]. The last is exact: with weights sorted by size the k largest become +-1, then
    ``a = sum h|w| / sum h`` over them and the error falls by ``(sum h|w|)^2 / sum h``, so the best k is looked up.
    """
    h = by_group(relative_importance(importance, weight.shape[1]).double(), group)  # [groups, width]
    real = by_group(torch.ones(weight.shape[1], dtype=torch.float64), group)
    parts = []
    step = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        size = by_group(weight[start : start + step].detach().double(), group).abs()  # [rows, groups, width]
        if kind != "mse":
            mean = size.sum(2) / real.sum(1)
            parts.append((mean * (STATISTICS if kind == "statistics" else 1.0)).float())
            continue
        size, order = size.sort(dim=2, descending=True, stable=True)
        share = h.expand_as(size).gather(2, order)
        mass, pull = share.cumsum(2), (share * size).cumsum(2)
        gain = torch.where(mass > 0, pull.square() / mass.clamp(min=1e-300), torch.zeros_like(mass))
        best = gain.argmax(2, keepdim=True)
        chosen = pull.gather(2, best) / mass.gather(2, best).clamp(min=1e-300)
        parts.append(chosen[..., 0].float())
    scales = torch.cat(parts)
    assert scales.shape == (len(weight), groups_of(group, weight.shape[1]))
    return scales


def trit_levels(scales: Tensor) -> Tensor:
    """``scales`` [rows, groups] -> the levels -a, 0, a: float32 [rows, groups, 3]."""
    return scales[..., None] * torch.tensor([-1.0, 0.0, 1.0])
