"""NF4 and FP4: the study's comparison of formats, and what the searched scale is worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.errors import InputError
from layerwise.recipe import parse_technique


def relative_error(recipe: str, weight: Tensor) -> float:
    made: Any = parse_technique(recipe)
    decoded = made.encode(weight, SiteStatistics.uninformed(*weight.shape)).decode()
    return float(((decoded - weight) ** 2).sum() / (weight**2).sum())


def test_errors_on_normal_weights_are_those_of_the_card() -> None:
    weight = torch.randn(128, 512, generator=torch.Generator().manual_seed(0))
    plain = ",group=64,search=false"
    assert relative_error("nf4:" + plain[1:], weight) == pytest.approx(0.0085, abs=4e-4)
    assert relative_error("fp4:levels=fp4" + plain, weight) == pytest.approx(0.0149, abs=6e-4)
    assert relative_error("fp4:levels=e2m1" + plain, weight) < 0.9 * relative_error("fp4:levels=fp4" + plain, weight)


def test_normal_quantiles_suit_normal_weights_better_than_even_levels() -> None:
    """Ablation: the same bits on an even grid (symmetric, so that neither stores zeros)."""
    weight = torch.randn(128, 512, generator=torch.Generator().manual_seed(0))
    even = relative_error("rtn:bits=4,group=64,symmetric=true,clip=false", weight)
    assert relative_error("nf4:group=64,search=false", weight) < 0.85 * even
    # and even levels suit evenly spread weights better
    spread = torch.rand(128, 512, generator=torch.Generator().manual_seed(0)) * 2 - 1
    even = relative_error("rtn:bits=4,group=64,symmetric=true,clip=false", spread)
    assert relative_error("nf4:group=64,search=false", spread) > 1.2 * even


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_the_search_is_weighted_by_the_inputs(name: str, weight: Tensor, site: Any) -> None:
    squares = torch.rand(72, generator=torch.Generator().manual_seed(3)) ** 6 * 50
    errors = []
    for options, known in (
        ("", site(torch.ones(40), squares)),
        ("", SiteStatistics.uninformed(40, 72)),
        (",search=false", site(torch.ones(40), squares)),
    ):
        made: Any = parse_technique(f"{name}:group=0{options}")
        errors.append(float(((made.encode(weight, known).decode() - weight) ** 2 @ squares).sum()))
    assert errors[0] < 0.95 * errors[1] and errors[0] < 0.9 * errors[2]


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_statistics_of_another_shape_are_refused(name: str, weight: Tensor, site: Any) -> None:
    made: Any = parse_technique(name)
    with pytest.raises(InputError, match="column statistics"):
        made.encode(weight, site(torch.ones(40), torch.ones(71)))
