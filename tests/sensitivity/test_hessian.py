"""Figures of the Hessian block against the block itself, written out, and the scores built on them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics, Use
from layerwise.recipe import parse_technique
from layerwise.roles import Scorer
from layerwise.sensitivity import hessian as module
from layerwise.sensitivity.hessian import hessian_of, mean_eigenvalue, top_eigenvalue
from layerwise.sensitivity.kronecker import damage

ROWS, COLUMNS = 5, 7


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moment(width: int, seed: int) -> Tensor:
    values = torch.randn(60, width, generator=generator(seed)) * torch.linspace(0.2, 3, width)
    return values.T @ values / 60


def use(seed: int, diagonal_rows: bool = False, scale: float = 0.3) -> Use:
    rows, columns = moment(ROWS, seed), moment(COLUMNS, seed + 1)
    return Use(
        rows.diagonal().clone() if diagonal_rows else rows, columns, columns, torch.ones(COLUMNS), scale, 60
    )  # fmt: skip


def block(statistics: SiteStatistics) -> Tensor:
    """The Hessian of ``damage`` itself, [m n, m n], by automatic differentiation."""

    def loss(flat: Tensor) -> Tensor:
        d, total = flat.view(ROWS, COLUMNS), torch.zeros((), dtype=torch.float64)
        for u in statistics.uses:
            rows = torch.diag(u.rows) if u.rows.dim() == 1 else u.rows
            total = total + u.scale * torch.trace(rows.double() @ d @ u.columns.double() @ d.T)
        return total

    return torch.autograd.functional.hessian(loss, torch.zeros(ROWS * COLUMNS, dtype=torch.float64))  # type: ignore[no-untyped-call, no-any-return]


CASES = {
    "one use": SiteStatistics((use(1),)),
    "diagonal rows": SiteStatistics((use(2, diagonal_rows=True),)),
    "tied table and head": SiteStatistics((use(3, diagonal_rows=True), use(5, scale=1.1))),
}


@pytest.mark.parametrize("statistics", CASES.values(), ids=CASES)
def test_eigenvalue_and_trace_are_those_of_the_block(statistics: SiteStatistics) -> None:
    values = torch.linalg.eigvalsh(block(statistics))
    assert top_eigenvalue(statistics) == pytest.approx(float(values[-1]), rel=1e-4)
    assert mean_eigenvalue(statistics) == pytest.approx(float(values.mean()), rel=1e-5)
    assert hessian_of(statistics).inputs > 0


def test_power_iteration_finds_what_the_decomposition_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = top_eigenvalue(SiteStatistics((use(1),)))
    monkeypatch.setattr(module, "EXACT_WIDTH", 1)
    assert top_eigenvalue(SiteStatistics((use(1),))) == pytest.approx(exact, rel=1e-4)


def test_a_linear_with_squared_loss_has_the_eigenvalue_of_its_inputs() -> None:
    """L = mean |W x - y|^2: the block is 2 (I kron H), so lambda = 2 lambda_max(H) = 4 scale lambda_max(H) / 2."""
    inputs = moment(COLUMNS, 9)
    one = SiteStatistics((Use(torch.ones(ROWS), inputs, inputs, torch.ones(COLUMNS), 1.0, 60),))
    assert top_eigenvalue(one) == pytest.approx(2 * float(torch.linalg.eigvalsh(inputs)[-1]), rel=1e-5)


def score(text: str, change: Tensor, statistics: SiteStatistics) -> float:
    scorer = parse_technique(text)
    assert isinstance(scorer, Scorer)
    return scorer.score(change, statistics)


@pytest.mark.parametrize("statistics", CASES.values(), ids=CASES)
def test_the_eigenvalue_bounds_the_damage_and_the_trace_is_its_mean(statistics: SiteStatistics) -> None:
    changes = [torch.randn(ROWS, COLUMNS, generator=generator(seed)) for seed in range(400)]
    damages = [damage(c, statistics) for c in changes]
    assert all(score("hessian_norm", c, statistics) >= d for c, d in zip(changes, damages, strict=True))
    traces = [score("hessian_norm:kind=trace", c, statistics) for c in changes]
    assert sum(traces) == pytest.approx(sum(damages), rel=0.15), "a change without a direction costs the mean"


def test_scaling_one_layer_up_and_the_next_down_changes_no_score() -> None:
    """W -> c W with gradients and curvature that answer: sensitivity does not depend on how a function is written."""
    change, factor = torch.randn(ROWS, COLUMNS, generator=generator(1)), 3.0
    plain = use(1)
    scaled = Use(plain.rows / factor**2, plain.columns, plain.inputs, plain.absolute_mean, plain.scale, 60)
    for text in ("hessian_norm", "hessian_norm:kind=trace", "curvature"):
        other = score(text, factor * change, SiteStatistics((scaled,)))
        assert other == pytest.approx(score(text, change, SiteStatistics((plain,))), rel=1e-4)
    blind = score("weight_error", factor * change, SiteStatistics((scaled,)))
    assert blind == pytest.approx(factor**2 * score("weight_error", change, SiteStatistics((plain,))), rel=1e-4)


def test_the_loss_tells_apart_what_the_layer_alone_cannot() -> None:
    """Two layers with equal inputs and equal changes, one of which the loss hardly reaches."""
    near, far = use(1), use(1, scale=0.003)
    change = torch.randn(ROWS, COLUMNS, generator=generator(2))
    ratio = {
        text: score(text, change, SiteStatistics((near,))) / score(text, change, SiteStatistics((far,)))
        for text in ("hessian_norm", "curvature", "output_error", "weight_error")
    }
    assert ratio["hessian_norm"] == pytest.approx(100, rel=1e-4) == ratio["curvature"]
    assert ratio["output_error"] == pytest.approx(1) == ratio["weight_error"]
