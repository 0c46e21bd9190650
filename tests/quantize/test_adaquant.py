"""AdaQuant: nothing learned is rounding to nearest, learning never ends worse, and what learned weights are worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.quantize.conftest import loss
from torch import Tensor

from layerwise.quantize.adaquant import damped, gathered, gradients, objective, spread
from layerwise.recipe import parse_technique


def encode(recipe: str, weight: Tensor, columns: Tensor, site: Any) -> Any:
    return parse_technique(recipe).encode(weight, site(torch.ones(len(weight)), columns))  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", ["", ",clip=false", ",scale_bits=8"])
def test_no_iterations_are_rounding_to_nearest(options: str, weight: Tensor, moments: Any, site: Any) -> None:
    fit, _ = moments(72)
    ours, nearest = (
        encode(f"{recipe}{options}", weight, fit, site)
        for recipe in ("adaquant:bits=3,group=32,iterations=0", "rtn:bits=3,group=32")
    )
    assert torch.equal(ours.codes(), nearest.codes()) and torch.equal(ours.decode(), nearest.decode())


@pytest.mark.parametrize("options", ["bits=2", "bits=4", "bits=3,scale_bits=8", "bits=3,rate=1"])
def test_what_is_kept_is_never_worse_than_the_start(options: str, weight: Tensor, moments: Any, site: Any) -> None:
    fit, _ = moments(72)
    curvature = damped(fit, 0.01)
    assert curvature is not None
    errors = [
        objective(encode(f"adaquant:{options},group=32,iterations={n}", weight, fit, site).decode() - weight, curvature)
        for n in (0, 3, 100)
    ]
    assert errors[1] <= errors[0] and errors[2] <= errors[0]


def test_ablation_learning_the_weights_is_what_lowers_the_error(weight: Tensor, moments: Any, site: Any) -> None:
    fit, held = moments(72)
    for bits in (2, 3):
        both, grid, none = (
            loss(encode(f"adaquant:bits={bits},group=32{o}", weight, fit, site).decode() - weight, held)
            for o in ("", ",weights=false", ",iterations=0")
        )
        assert both < 0.95 * none and both < grid


def test_the_codes_leave_the_cells_of_the_weights(weight: Tensor, moments: Any, site: Any) -> None:
    encoded = encode("adaquant:bits=3,group=32", weight, moments(72)[0], site)
    away = (encoded.decode() - weight).abs() / spread(encoded.fitted.steps(), encoded.fitted)
    assert float(away.max()) > 0.6  # no rounding to either neighbour of a weight inside the range goes beyond 1


def test_gradients_are_those_of_the_chain_rule(weight: Tensor, moments: Any, site: Any) -> None:
    """Autograd finds the same where rounding is replaced by its offset, whose gradient is none."""
    fitted = encode("rtn:bits=3,group=32", weight, moments(72)[0], site).fitted
    assert torch.equal(gathered(torch.ones(40, 72), fitted), torch.tensor([[32.0, 32.0, 8.0]]).expand(40, 3))
    log, zeros, moved = fitted.steps().log().requires_grad_(), fitted.zeros().requires_grad_(), weight.clone()
    moved.requires_grad_()
    steps, zero = spread(log.exp(), fitted), spread(zeros, fitted)
    level = (moved / steps).detach()
    shifted = moved / steps + (level.round() - level) + zero
    code = shifted.clamp(0, fitted.grid.top)
    pull = torch.randn(40, 72, generator=torch.Generator().manual_seed(0))
    ((code - zero) * steps * pull).sum().backward()
    inside = (shifted == code).detach()
    assert int((~inside).sum()) > 0
    ours = gradients(pull, inside, level, (code - zero).detach(), steps.detach(), fitted)
    for mine, theirs in zip(ours, (moved.grad, log.grad, zeros.grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
