"""PHNN: the algebra of sums of Kronecker products, the best of them, and what fitting to the inputs is worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.factorize.conftest import loss
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.encoding.kronecker import Kronecker
from layerwise.factorize._kronecker import Pull, blocks_of, fit_mixers, fit_shared, start
from layerwise.factorize._whitening import Curvature
from layerwise.recipe import parse_technique


def encode(options: str, weight: Tensor, known: SiteStatistics) -> Any:
    return parse_technique(f"phnn:{options}").encode(weight, known)  # type: ignore[attr-defined]


def made(mixers: Tensor, shared: Tensor) -> Tensor:
    """sum_t A_t (x) S_t, the textbook way; ``shared`` [h, T k]."""
    stack = shared.unflatten(1, (len(mixers), -1)).transpose(0, 1)
    return torch.stack([torch.kron(a.contiguous(), s.contiguous()) for a, s in zip(mixers, stack, strict=True)]).sum(0)


def test_the_stored_form_is_the_sum_of_kronecker_products(weight: Tensor) -> None:
    found = encode("order=4", weight, SiteStatistics.uninformed(40, 72))
    assert isinstance(found, Kronecker) and found.algebra == (4, 4) and found.terms == 4
    expected = made(found.mixers.decode().view(4, 4, 4).double(), found.blocks.decode().double())
    torch.testing.assert_close(found.decode().double(), expected, rtol=1e-6, atol=1e-7)
    assert found.nbytes == 2 * 40 * 72 // 4 + 4 * 4**3  # s d / n values of blocks and n^3 of mixers


@pytest.mark.parametrize("terms", [1, 3, 4, 15, 16])
def test_the_start_loses_just_the_dropped_singular_values(terms: int, weight: Tensor) -> None:
    """Of the matrix whose rows are the blocks; all p q terms give the weight back."""
    mixers, stack, sigma = start(weight, 4, 4, terms)
    change = made(mixers, stack.transpose(0, 1).flatten(1)) - weight.double()
    assert float(change.square().sum()) == pytest.approx(float((sigma[terms:] ** 2).sum()), rel=1e-6, abs=1e-12)
    rows = torch.linalg.svdvals(blocks_of(weight.double(), 4, 4).reshape(16, -1))
    torch.testing.assert_close(sigma, rows, rtol=1e-6, atol=1e-7)


def test_quaternions_multiply_as_hamilton_says() -> None:
    """order = 4 with the fixed mixing matrices of left multiplication is a quaternion layer."""
    one, i, j, k = torch.eye(4), *(torch.zeros(4, 4) for _ in range(3))
    for basis, entries in (
        (i, ((0, 1, -1), (1, 0, 1), (2, 3, -1), (3, 2, 1))),
        (j, ((0, 2, -1), (1, 3, 1), (2, 0, 1), (3, 1, -1))),
        (k, ((0, 3, -1), (1, 2, -1), (2, 1, 1), (3, 0, 1))),
    ):
        for row, column, sign in entries:
            basis[row, column] = sign
    a, b = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    matrix = made(torch.stack([one, i, j, k]), a.view(1, 4))
    scalar = a[0] * b[0] - a[1:] @ b[1:]
    vector = a[0] * b[1:] + b[0] * a[1:] + torch.linalg.cross(a[1:], b[1:])
    torch.testing.assert_close(matrix @ b, torch.cat([scalar[None], vector]))


def test_least_squares_leave_no_slope(weight: Tensor, moments: Any) -> None:
    """Neither factor can be improved once it is solved for, and no round of both raises the objective."""
    moment = Curvature.of(moments(72)[0], 1e-3)
    pull, (mixers, _, _) = Pull.of(weight, moment, 4, 4), start(weight, 4, 4, 4)
    matrix = moment.times(torch.eye(72, dtype=torch.float64))
    before = float("inf")
    for _ in range(4):
        shared, inner = fit_shared(pull, mixers)
        slope = (made(mixers, shared) - weight.double()) @ matrix
        # along S: what a change of the shared blocks alone would do
        along = torch.einsum("tab,abhx->thx", mixers, blocks_of(slope, 4, 4))
        assert float(along.abs().max()) < 1e-8 and torch.allclose(inner, inner.T)
        mixers = fit_mixers(pull, shared, 4)
        change = made(mixers, shared) - weight.double()
        stack = shared.unflatten(1, (4, -1))
        along = torch.einsum("htx,abhx->tab", stack, blocks_of(change @ matrix, 4, 4))
        assert float(along.abs().max()) < 1e-8
        now = loss(change, matrix)
        assert now <= before * (1 + 1e-9)
        before = now


@pytest.mark.parametrize("bits", [16, 3])
def test_fitting_to_the_inputs_lowers_the_error_on_other_tokens(
    bits: int, weight: Tensor, moments: Any, site: Any
) -> None:
    """Ablation: the SVD of the blocks alone, and the same with a moment of shuffled inputs."""
    fit, held = moments(72)
    shuffle = torch.randperm(72, generator=torch.Generator().manual_seed(2))
    errors = [
        loss(encode(f"order=4,terms=8,bits={bits},{rest}", weight, site(torch.ones(40), side)).decode() - weight, held)
        for rest, side in (("rounds=6", fit), ("rounds=0", fit), ("rounds=6", fit[shuffle][:, shuffle]))
    ]
    assert errors[0] < 0.8 * errors[1] and errors[0] < 0.8 * errors[2]


def test_learnt_mixers_beat_fixed_ones(weight: Tensor, moments: Any) -> None:
    """Ablation: mixers with one entry each (a grouped layer: four blocks kept, the rest zero), S solved for as well."""
    moment = Curvature.of(moments(72)[0], 1e-3)
    pull, (mixers, _, _) = Pull.of(weight, moment, 4, 4), start(weight, 4, 4, 4)
    grouped = torch.zeros(4, 4, 4, dtype=torch.float64)
    grouped[range(4), range(4), range(4)] = 1
    matrix = moment.times(torch.eye(72, dtype=torch.float64))
    errors = []
    for chosen in (mixers, grouped):
        shared, _ = fit_shared(pull, chosen)
        errors.append(loss(made(chosen, shared) - weight.double(), matrix))
    assert errors[0] < 0.9 * errors[1]


def test_shapes_that_the_order_does_not_divide_keep_what_it_shares_with_them(site: Any) -> None:
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    found = encode("order=6", weight, SiteStatistics.uninformed(6, 9))
    assert found.algebra == (6, 3) and found.shape == (6, 9)
    assert encode("order=4", weight[:5, :7].contiguous(), SiteStatistics.uninformed(5, 7)).algebra == (1, 1)
