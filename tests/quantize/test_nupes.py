"""The power exponent: the even grid at 1, the gain where scales are coarse, and scaling with the weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.quantize.conftest import loss
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.recipe import parse_technique


def encoded(recipe: str, weight: Tensor, statistics: SiteStatistics | None = None) -> Any:
    made: Any = parse_technique(recipe)
    return made.encode(weight, statistics or SiteStatistics.uninformed(*weight.shape))


def relative_error(recipe: str, weight: Tensor) -> float:
    return float(((encoded(recipe, weight).decode() - weight) ** 2).sum() / (weight**2).sum())


def normal(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("bits", "group", "searched", "even"), [(4, 128, 0.0117, 0.0138), (3, 128, 0.0613, 0.075)])
def test_errors_on_normal_weights_are_those_of_the_card(bits: int, group: int, searched: float, even: float) -> None:
    weight, options = normal(256, 512), f"bits={bits},group={group},clip=false"
    assert relative_error(f"nupes:{options}", weight) == pytest.approx(searched, rel=0.03)
    assert relative_error(f"nupes:{options},exponent=1", weight) == pytest.approx(even, rel=0.03)


def test_the_exponent_is_worth_most_where_scales_are_coarse() -> None:
    """Ablation: exponent 1 is the even grid; one scale for 65 thousand weights in place of 128."""
    weight = normal(1, 65536)
    gains = []
    for group in (0, 128):
        even, searched = (relative_error(f"nupes:group={group},clip=false,exponent={a}", weight) for a in (1, 0))
        gains.append(searched / even)
    assert gains[0] < 0.75 and gains[0] < gains[1] - 0.08 and gains[1] < 0.9
    form = encoded("nupes:group=0,clip=false", weight)
    assert 0.55 <= int(form.exponent[0]) / 64 <= 0.75


def test_exponent_one_is_rounding_to_nearest_on_an_even_grid(weight: Tensor) -> None:
    form = encoded("nupes:bits=4,group=0,exponent=1,clip=false", weight)
    step = form.scales.values() / 7
    assert torch.equal(form.codes().float() - 7, (weight / step).round().clamp(-7, 7))


@pytest.mark.parametrize("options", ["", ",by_row=true", ",clip=false", ",group=0,bits=3"])
def test_a_searched_exponent_is_never_worse_than_one(options: str, weight: Tensor) -> None:
    heavy = weight * weight.abs().sqrt()
    for values in (weight, heavy):
        errors = [relative_error(f"nupes:exponent={a}{options}", values) for a in (0, 1)]
        assert errors[0] <= errors[1] * 1.001  # scales are rounded to fp16 after the search
    assert relative_error("nupes:by_row=true" + options.replace(",by_row=true", ""), heavy) <= 1.001 * relative_error(
        "nupes:by_row=false" + options.replace(",by_row=true", ""), heavy
    )


def test_codes_do_not_depend_on_the_weights_unit(weight: Tensor) -> None:
    plain, scaled = encoded("nupes", weight), encoded("nupes", 8 * weight)
    assert torch.equal(plain.codes(), scaled.codes()) and torch.equal(8 * plain.decode(), scaled.decode())
    assert torch.equal(encoded("nupes", -weight).decode(), -plain.decode())


def test_feedback_lowers_the_loss_it_rounds_against(weight: Tensor, moments: Any, site: Any) -> None:
    columns, rows = moments(72)[0], moments(40, 1)[0]
    errors = [
        loss(encoded(f"nupes:bits=3,feedback={on}", weight, site(rows, columns)).decode() - weight, columns, rows)
        for on in ("true", "false")
    ]
    assert errors[0] < 0.6 * errors[1]
