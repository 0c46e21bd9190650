"""Plain SVD and ASVD: the loss each truncation leaves, their limits, and what scaling by the inputs is worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.factorize.conftest import loss
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics, Use
from layerwise.encoding.lowrank import LowRank
from layerwise.factorize._whitening import rank_of
from layerwise.recipe import parse_technique


def encode(recipe: str, weight: Tensor, known: SiteStatistics) -> Any:
    return parse_technique(recipe).encode(weight, known)  # type: ignore[attr-defined]


def inputs(scale: Tensor, seed: int = 0, correlated: float = 0.0) -> tuple[SiteStatistics, Tensor]:
    """(what calibration measures of Laplacian inputs of these sizes, second moment of other inputs of that kind)."""
    generator, n = torch.Generator().manual_seed(seed), len(scale)
    draws = torch.rand(2, 40 * n, n, generator=generator) - 0.5
    x = -draws.sign() * torch.log1p(-2 * draws.abs().clamp(max=0.4999)) * scale
    x = x + correlated * x.roll(1, 2)
    seen, held = (part.T @ part / len(part) for part in x)
    rows = torch.ones(40)
    return SiteStatistics((Use(rows, seen, seen, x[0].abs().mean(0), 1.0, 1000),)), held


def test_svd_is_the_nearest_matrix_of_its_rank(weight: Tensor) -> None:
    known = SiteStatistics.uninformed(40, 72)
    found = encode("svd:ratio=0.7", weight, known)
    assert isinstance(found, LowRank) and found.rank == rank_of(0.7, 40, 72)
    sigma = torch.linalg.svdvals(weight.double())
    change = (found.decode() - weight).double()
    assert float(change.square().sum()) == pytest.approx(float((sigma[found.rank :] ** 2).sum()), rel=1e-4)
    assert loss(encode("svd:ratio=4", weight, known).decode() - weight, torch.eye(72)) < 1e-6


def test_asvd_loses_the_dropped_singular_values_of_the_scaled_weight(weight: Tensor) -> None:
    known, _ = inputs(torch.linspace(0.2, 6, 72))
    scale = known.absolute_mean.double() ** 0.5
    sigma = torch.linalg.svdvals(weight.double() * scale)
    change = (encode("asvd:ratio=0.6", weight, known).decode() - weight).double() * scale
    rank = rank_of(0.6, 40, 72)
    assert float(change.square().sum()) == pytest.approx(float((sigma[rank:] ** 2).sum()), rel=1e-3)


def test_alpha_zero_and_flat_inputs_give_the_plain_svd(weight: Tensor) -> None:
    known, _ = inputs(torch.linspace(0.2, 6, 72))
    plain = encode("svd:ratio=0.5", weight, known).decode()
    torch.testing.assert_close(encode("asvd:ratio=0.5,alpha=0", weight, known).decode(), plain, rtol=0, atol=2e-3)
    flat = SiteStatistics.uninformed(40, 72)
    torch.testing.assert_close(encode("asvd:ratio=0.5", weight, flat).decode(), plain, rtol=0, atol=2e-3)


@pytest.mark.parametrize("bits", [16, 4])
def test_scaling_lowers_the_output_error_on_other_inputs(bits: int, weight: Tensor) -> None:
    """Ablation: the same without scales, and with the scales of other columns. The whole moment is better still."""
    known, held = inputs(torch.logspace(-1, 1, 72), correlated=0.8)
    use = known.uses[0]
    turned = SiteStatistics((Use(use.rows, use.columns, use.inputs, use.absolute_mean.flip(0), 1.0, 1000),))
    options = f"ratio=0.5,factor_bits={bits}"
    errors = [
        loss(encode(f"{name}:{options}", weight, statistics).decode() - weight, held)
        for name, statistics in (("svd_llm", known), ("asvd", known), ("svd", known), ("asvd", turned))
    ]
    assert errors[0] < errors[1] < 0.8 * errors[2] and errors[1] < 0.8 * errors[3]
