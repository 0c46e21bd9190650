"""RTN: the card's laws, and what its clip search and its groups are worth."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.encoding.grid import group_of
from layerwise.errors import InputError
from layerwise.recipe import parse_technique


def encode(recipe: str, weight: Tensor, statistics: SiteStatistics | None = None) -> Any:
    return parse_technique(recipe).encode(weight, statistics or SiteStatistics.uninformed(*weight.shape))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("options", ["", ",symmetric=true", ",scale_bits=8"])
def test_every_weight_is_within_half_a_step(bits: int, options: str, weight: Tensor) -> None:
    encoded = encode(f"rtn:bits={bits},group=32,clip=false{options}", weight)
    step = encoded.fitted.steps()[:, group_of(72, encoded.grid)]
    assert bool(((encoded.decode() - weight).abs() <= step / 2 * (1 + 1e-5)).all())


def test_encoding_a_decoded_weight_changes_nothing(weight: Tensor) -> None:
    once = encode("rtn:bits=3,group=0,clip=false", weight).decode()
    once[:, :2] = torch.stack([once.amin(1), once.amax(1)], 1)  # the range, and so the grid, stays
    twice = encode("rtn:bits=3,group=0,clip=false", once).decode()
    torch.testing.assert_close(twice, once, rtol=2e-3, atol=1e-4)


def test_no_other_codes_are_nearer() -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    encoded = encode("rtn:bits=2,group=0,clip=false", weight)
    error = ((encoded.decode() - weight) ** 2).sum(1)
    steps, zeros = encoded.fitted.steps(), encoded.fitted.zeros()
    for codes in itertools.product(range(4), repeat=4):
        other = (torch.tensor(codes).float() - zeros) * steps
        assert bool((error <= ((other - weight) ** 2).sum(1) * (1 + 1e-6)).all())


def test_groups_earn_their_bytes(weight: Tensor) -> None:
    wide = weight * torch.linspace(0.1, 3, 72)
    whole, grouped = (encode(f"rtn:bits=3,group={g}", wide) for g in (0, 24))
    assert ((grouped.decode() - wide) ** 2).sum() < 0.7 * ((whole.decode() - wide) ** 2).sum()


def test_the_clip_search_is_weighted_by_the_inputs(weight: Tensor, site: Any) -> None:
    """Ablation: without the statistics the same search leaves more output error at 2 bits."""
    squares = torch.rand(72, generator=torch.Generator().manual_seed(3)) ** 6 * 50
    errors = {
        name: float(((encode("rtn:bits=2,group=0" + clip, weight, known).decode() - weight) ** 2 @ squares).sum())
        for name, clip, known in [
            ("weighted", "", site(torch.ones(40), squares)),
            ("plain", "", None),
            ("unclipped", ",clip=false", None),
        ]
    }
    assert errors["weighted"] < 0.9 * errors["plain"] and errors["weighted"] < 0.9 * errors["unclipped"]


def test_random_rounding_is_clearly_worse(weight: Tensor) -> None:
    encoded = encode("rtn:bits=4,group=32,clip=false", weight)
    step = encoded.fitted.steps()[:, group_of(72, encoded.grid)]
    coin = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    random = torch.where(coin, (weight / step).floor(), (weight / step).ceil()) * step
    assert ((encoded.decode() - weight) ** 2).sum() < 0.4 * ((random - weight) ** 2).sum()


def test_statistics_of_another_shape_are_refused(weight: Tensor, site: Any) -> None:
    with pytest.raises(InputError, match="column statistics"):
        encode("rtn", weight, site(torch.ones(40), torch.ones(71)))
