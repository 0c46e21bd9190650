"""GPTQ: against the paper's own update, its identity, its fallbacks, and what compensation is worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.quantize.conftest import loss
from torch import Tensor

from layerwise.encoding.grid import FittedGrid, Grid, fit_grid, group_of
from layerwise.quantize._rounding import factor, round_with_feedback
from layerwise.recipe import parse_technique


def damped(moment: Tensor, share: float = 0.01) -> Tensor:
    moment = moment.double()
    return moment + share * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)


def as_in_the_paper(weight: Tensor, moment: Tensor, fitted: Any) -> tuple[Tensor, Tensor]:
    """The published update with the inverse's Cholesky factor, in plain torch: codes and the errors e [m, n]."""
    upper = torch.linalg.cholesky(torch.linalg.inv(moment), upper=True)
    groups = group_of(weight.shape[1], fitted.grid)
    step, zero = fitted.steps().double()[:, groups], fitted.zeros().double()[:, groups]
    current, codes, errors = weight.double().clone(), torch.empty(weight.shape), torch.empty(weight.shape).double()
    for j in range(weight.shape[1]):
        code = ((current[:, j] / step[:, j]).round() + zero[:, j]).clamp(0, fitted.grid.top)
        error = (current[:, j] - (code - zero[:, j]) * step[:, j]) / upper[j, j]
        current[:, j:] -= error[:, None] * upper[j, j:]
        codes[:, j], errors[:, j] = code, error
    return codes.to(torch.uint8), errors


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_codes_are_those_of_the_papers_update(
    bits: int, symmetric: bool, weight: Tensor, moments: Any, site: Any
) -> None:
    fit, _ = moments(72)
    options = f"bits={bits},group=32,act_order=false,symmetric={str(symmetric).lower()}"
    encoded = parse_technique(f"gptq:{options}").encode(weight, site(torch.ones(40), fit))
    codes, errors = as_in_the_paper(weight, damped(fit), encoded.fitted)
    assert torch.equal(encoded.codes(), codes)
    # and the identity tr(D H D^T) = sum e^2 holds for the decoded weight
    change = encoded.decode().double() - weight.double()
    assert loss(change, damped(fit)) == pytest.approx(float((errors**2).sum()), rel=1e-6)


def test_order_of_the_largest_inputs_first(weight: Tensor, moments: Any, site: Any) -> None:
    fit, _ = moments(72)
    encoded = parse_technique("gptq:bits=3,group=32").encode(weight, site(torch.ones(40), fit))
    order = torch.argsort(fit.diagonal(), stable=True).flip(0)
    groups = group_of(72, encoded.grid)[order]
    steps, zeros = encoded.fitted.scale[:, groups], encoded.fitted.zero[:, groups]
    fitted = FittedGrid(Grid(3, 1), 72, steps, None, zeros)  # a step per column lets the reference take any order
    codes, _ = as_in_the_paper(weight[:, order], damped(fit[order][:, order]), fitted)
    assert torch.equal(encoded.codes()[:, order], codes)


@pytest.mark.parametrize("options", ["", ",act_order=false", ",symmetric=true", ",scale_bits=8", ",clip=false"])
def test_without_correlation_it_is_rounding_to_nearest(options: str, weight: Tensor, site: Any) -> None:
    squares = torch.rand(72, generator=torch.Generator().manual_seed(0)) + 0.1
    squares[5] = 0  # a column that no token reached is rounded like any other
    plain = options.replace(",act_order=false", "")
    for columns in (squares, torch.diag(squares), torch.zeros(72, 72)):
        known = site(torch.ones(40), columns)
        one, two = (parse_technique(f"{n}:bits=3,group=32{o}") for n, o in (("gptq", options), ("rtn", plain)))
        ours, nearest = one.encode(weight, known), two.encode(weight, known)
        assert torch.equal(ours.codes(), nearest.codes()) and torch.equal(ours.decode(), nearest.decode())


@pytest.mark.parametrize("block", [1, 7, 32, 64, 500])
def test_the_size_of_a_block_does_not_change_the_codes(block: int, weight: Tensor, moments: Any) -> None:
    fit, _ = moments(72)
    fitted, side = fit_grid(weight, Grid(3, 32)), factor(fit, 0.01, largest_first=True)
    assert side is not None
    for sweeps in (0, 2):
        reference = round_with_feedback(weight, fitted, side, sweeps=sweeps)
        assert torch.equal(round_with_feedback(weight, fitted, side, sweeps=sweeps, block=block), reference)


def test_compensation_is_what_lowers_the_error_on_other_tokens(weight: Tensor, moments: Any, site: Any) -> None:
    """Ablation: the same technique told only the diagonal of H leaves far more error on held-out inputs."""
    fit, held = moments(72)
    for bits in (2, 3, 4):
        errors = []
        for columns in (fit, torch.diag(fit.diagonal())):
            encoded = parse_technique(f"gptq:bits={bits},group=32").encode(weight, site(torch.ones(40), columns))
            errors.append(loss(encoded.decode() - weight, held))
        assert errors[0] < 0.6 * errors[1]


def test_a_fine_grid_returns_the_weight(weight: Tensor, moments: Any, site: Any) -> None:
    encoded = parse_technique("gptq:bits=8,group=8,clip=false").encode(weight, site(torch.ones(40), moments(72)[0]))
    assert float((encoded.decode() - weight).abs().max()) < 0.02 * float(weight.abs().max())


def test_damping_rises_until_a_singular_moment_factors() -> None:
    vector = torch.randn(30, generator=torch.Generator().manual_seed(0)) * 1e8
    side = factor(torch.outer(vector, vector), 0.0)
    assert side is not None and bool(torch.isfinite(side.lower).all())
    assert bool((side.lower.diagonal() == 1).all()) and bool((side.lower.triu(1) == 0).all())
    assert factor(torch.zeros(4, 4), 0.01) is None and factor(torch.ones(4), 0.01) is None


def test_a_factored_side_multiplies_back(moments: Any) -> None:
    fit, _ = moments(30)
    side = factor(fit, 0.02, largest_first=True)
    assert side is not None
    product = side.lower * side.pivots @ side.lower.T
    torch.testing.assert_close(product, side.matrix)
    torch.testing.assert_close(product * fit.diagonal().double().mean(), damped(fit, 0.02)[side.order][:, side.order])
    assert bool((fit.diagonal()[side.order].diff() >= 0).all())
    torch.testing.assert_close(side.importance()[side.order], side.pivots.float())


def test_a_side_is_factored_in_place_of_its_own_memory_alone(moments: Any) -> None:
    """Without sweeps nothing is kept but the factor, which is the same; the moment stays as it was."""
    fit, _ = moments(300)
    before = fit.clone()
    with_matrix, alone = (factor(fit, 0.01, largest_first=True, sweeps=sweeps) for sweeps in (True, False))
    assert with_matrix is not None and alone is not None
    assert torch.equal(with_matrix.upper, alone.upper) and torch.equal(with_matrix.pivots, alone.pivots)
    assert alone.upper.is_contiguous() and not alone.matrix.numel() and torch.equal(fit, before)
