"""One ternary plane: the cards' errors and laws of its scales, and what feedback is worth."""

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


def normal(rows: int = 128, columns: int = 512) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("scale", "expected"), [("mse", 0.190), ("absmean", 0.264), ("statistics", 0.200)])
def test_errors_on_normal_weights_are_those_of_the_card(scale: str, expected: float) -> None:
    assert relative_error(f"ternary:group=0,scale={scale}", normal()) == pytest.approx(expected, rel=0.02)


def test_the_mse_scale_is_the_best_of_a_line_search(weight: Tensor) -> None:
    found = encoded("ternary:group=0,scale=mse", weight).scales.values()[:, 0].double()
    tried = found[:, None] * torch.linspace(0.5, 1.5, 401).double()
    rounded = (weight.double()[:, None] / tried[..., None]).round().clamp(-1, 1) * tried[..., None]
    errors = (rounded - weight.double()[:, None]).square().sum(2)
    assert bool((errors[:, 200] <= errors.amin(1) * (1 + 1e-5)).all())


def test_statistics_make_three_levels_of_evenly_spread_weights_equally_likely() -> None:
    even = torch.rand(64, 2048, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for weight, zeros in ((even, 1 / 3), (normal(64, 2048), 0.405)):
        codes = encoded("ternary:group=0,scale=statistics", weight).codes()
        assert float((codes == 1).float().mean()) == pytest.approx(zeros, abs=0.01)
        assert float((codes == 0).float().mean()) == pytest.approx((1 - zeros) / 2, abs=0.01)
    decoded = encoded("ternary:group=0,scale=statistics", even).decode()
    assert float(decoded.std() / even.std()) == pytest.approx(0.943, abs=0.01)


@pytest.mark.parametrize("scale", ["mse", "absmean", "statistics"])
def test_it_scales_and_flips_with_the_weight(scale: str, weight: Tensor) -> None:
    recipe = f"ternary:group=0,scale={scale}"
    plain, four, flipped = (encoded(recipe, w) for w in (weight, 4 * weight, -weight))
    assert torch.equal(four.codes(), plain.codes()) and torch.equal(four.decode(), 4 * plain.decode())
    assert torch.equal(flipped.decode(), -plain.decode())


def test_a_shared_scale_is_the_matrix_mean(weight: Tensor) -> None:
    form = encoded("ternary:scale=absmean,shared=true", weight)
    assert form.group == 0 and form.scales.values().unique().tolist() == [float(weight.abs().mean().half())]
    gamma = weight.abs().mean().half().float()
    assert torch.equal(form.codes()[:, 0].float() - 1, (weight / gamma).round().clamp(-1, 1))


def test_feedback_lowers_the_loss_it_rounds_against(weight: Tensor, moments: Any, site: Any) -> None:
    columns, rows = moments(72)[0], moments(40, 1)[0]
    known = site(rows, columns)
    errors = [
        loss(encoded(f"ternary:feedback={on}", weight, known).decode() - weight, columns, rows)
        for on in ("true", "false")
    ]
    assert errors[0] < 0.6 * errors[1]
