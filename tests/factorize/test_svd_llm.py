"""SVD-LLM: the truncation's exact loss, its limits, and what each whitening is worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.factorize.conftest import loss
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.errors import InputError
from layerwise.factorize._whitening import Curvature, best_factors, rank_of
from layerwise.recipe import parse_technique


def encode(options: str, weight: Tensor, known: SiteStatistics) -> Any:
    return parse_technique(f"svd_llm:{options}").encode(weight, known)


def truncated(weight: Tensor, rows: Tensor, columns: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(W' float64, all sigma) without damping."""
    left, right, sigma = best_factors(weight, Curvature.of(rows, 0.0), Curvature.of(columns, 0.0), rank)
    return left @ right, sigma


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("one_sided", [False, True])
def test_the_loss_is_the_squares_of_the_dropped_singular_values(
    tall: bool, one_sided: bool, weight: Tensor, moments: Any
) -> None:
    weight = (weight.T if tall else weight).double()
    rows, columns = (moments(n, n)[0].double() for n in weight.shape)
    rows = torch.eye(len(rows), dtype=torch.float64) if one_sided else rows
    means = [side.diagonal().mean() for side in (rows, columns)]
    for rank in (1, 9, 40):
        found, sigma = truncated(weight, rows, columns, rank)
        dropped = float((sigma[rank:] ** 2).sum()) * float(means[0] * means[1])
        assert loss(found - weight, columns, rows) == pytest.approx(dropped, rel=1e-8, abs=1e-14)
    assert torch.allclose(truncated(weight, rows, columns, 40)[0], weight, atol=1e-10)  # full rank gives W back


def test_it_is_the_papers_formula_with_any_root(weight: Tensor, moments: Any) -> None:
    weight, moment = weight.double(), moments(72)[0].double()
    found, _ = truncated(weight, torch.ones(40), moment, 9)
    values, vectors = torch.linalg.eigh(moment)
    for root in (torch.linalg.cholesky(moment), vectors @ torch.diag(values.sqrt()) @ vectors.T):
        u, sigma, v = torch.linalg.svd(weight @ root, full_matrices=False)
        expected = u[:, :9] * sigma[:9] @ v[:9] @ torch.linalg.inv(root)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_white_inputs_give_the_plain_svd(weight: Tensor) -> None:
    u, sigma, v = torch.linalg.svd(weight.double(), full_matrices=False)
    for side in (torch.ones(72), torch.eye(72)):
        found, _ = truncated(weight, torch.ones(40), side, 9)
        torch.testing.assert_close(found, u[:, :9] * sigma[:9] @ v[:9], rtol=1e-7, atol=1e-9)


def test_factors_are_normalised(weight: Tensor, moments: Any) -> None:
    """A^T R A = I and B C B^T = Sigma_k^2, which the rounding of the factors relies on; tall and wide alike."""
    for matrix in (weight, weight.T.contiguous()):
        rows, columns = (Curvature.of(moments(n, n)[0], 0.01) for n in matrix.shape)
        left, right, sigma = best_factors(matrix, rows, columns, 9)
        torch.testing.assert_close(left.T @ rows.times(left.contiguous()), torch.eye(9).double(), rtol=0, atol=1e-8)
        squares = right @ columns.times(right.T.contiguous())
        torch.testing.assert_close(squares, torch.diag(sigma[:9] ** 2), rtol=1e-6, atol=1e-8)


def test_a_root_is_undone_and_gives_the_curvature(moments: Any) -> None:
    x = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for side in (moments(40)[0], torch.rand(40, generator=torch.Generator().manual_seed(1)), torch.zeros(40)):
        curvature = Curvature.of(side, 0.01)
        seen = curvature.root_times(x)
        torch.testing.assert_close(curvature.root_solve(seen), x)
        torch.testing.assert_close(seen.T @ seen, x.T @ curvature.times(x))


def test_no_other_rank_k_weight_is_better(weight: Tensor, moments: Any, site: Any) -> None:
    fit, _ = moments(72)
    least = loss(encode("ratio=0.5,damp=0", weight, site(torch.ones(40), fit)).decode() - weight, fit)
    generator = torch.Generator().manual_seed(0)
    left, right, _ = best_factors(weight, Curvature.of(torch.ones(40), 0), Curvature.of(fit, 0), rank_of(0.5, 40, 72))
    for _ in range(50):
        moved = (left + 1e-2 * torch.randn(left.shape, generator=generator)) @ right
        assert loss(moved - weight, fit) >= least * (1 - 1e-6)


@pytest.mark.parametrize("bits", [16, 4])
def test_whitening_lowers_the_output_error_on_other_tokens(bits: int, weight: Tensor, moments: Any, site: Any) -> None:
    """Ablation: the same with white inputs, and with a moment of shuffled features, which must lose the gain."""
    fit, held = moments(72)
    shuffle = torch.randperm(72, generator=torch.Generator().manual_seed(2))
    errors = [
        loss(encode(f"ratio=0.6,factor_bits={bits}", weight, site(torch.ones(40), side)).decode() - weight, held)
        for side in (fit, torch.eye(72), fit[shuffle][:, shuffle])
    ]
    assert errors[0] < 0.8 * errors[1] and errors[0] < 0.8 * errors[2]


@pytest.mark.parametrize("bits", [16, 3])
def test_whitening_both_sides_lowers_the_loss_on_other_tokens(
    bits: int, weight: Tensor, moments: Any, site: Any
) -> None:
    (fit, held), (gradient, held_gradient) = moments(72), moments(40, 1)
    known = site(gradient, fit)
    errors = [
        loss(
            encode(f"ratio=0.6,factor_bits={bits},curvature={c}", weight, known).decode() - weight, held, held_gradient
        )
        for c in ("loss", "inputs")
    ]
    assert errors[0] < 0.85 * errors[1]


def test_rounded_factors_that_know_each_other_lose_less(weight: Tensor, moments: Any, site: Any) -> None:
    """Ablations: the same factors rounded to nearest, and fitted to each other only once."""
    from layerwise.encoding.grid import Grid, fit_grid, points, round_to_grid

    fit, gradient = moments(72)[0], moments(40, 1)[0]
    rows, columns = Curvature.of(gradient, 0.1), Curvature.of(fit, 1e-4)
    left, right, _ = best_factors(weight, rows, columns, rank_of(0.8, 40, 72))
    plain = []
    for values in (left.T.float().contiguous(), right.float().contiguous()):
        fitted = fit_grid(values, Grid(3, 64), clip=True)
        plain.append(points(round_to_grid(values, fitted), fitted))
    known, options = site(gradient, fit), "ratio=0.8,factor_bits=3,curvature=loss"
    errors = [loss(plain[0].T @ plain[1] - weight, fit, gradient)] + [
        loss(encode(f"{options},rounds={n}", weight, known).decode() - weight, fit, gradient) for n in (1, 6)
    ]
    assert errors[1] < 0.8 * errors[0] and errors[2] < errors[1]


def test_the_rank_is_a_share_of_the_values() -> None:
    assert rank_of(0.5, 192, 192) == 48 and rank_of(1e-3, 5, 1) == 1 and rank_of(4, 6, 9) == 6
    layout = parse_technique("svd_llm:ratio=0.5").layout(192, 192)  # type: ignore[attr-defined]
    assert sum(t.itemsize * torch.Size(s).numel() for t, s in layout.values()) == 192 * 192


def test_a_tall_table_with_counts(site: Any, moments: Any) -> None:
    """Rows that are looked up often keep more of themselves than rows that are not."""
    table = torch.randn(300, 24, generator=torch.Generator().manual_seed(0))
    counts = torch.ones(300)
    counts[:10] = 1000
    change = encode("ratio=0.5,curvature=loss", table, site(counts, moments(24)[0])).decode() - table
    errors = (change @ moments(24)[0] * change).sum(1)
    assert float(errors[:10].mean()) < 0.3 * float(errors[10:].mean())


def test_misfits_are_refused(weight: Tensor, site: Any) -> None:
    with pytest.raises(InputError, match="column statistics"):
        encode("ratio=0.5", weight, site(torch.ones(40), torch.ones(71)))
    with pytest.raises(InputError, match="not finite"):
        encode("ratio=0.5", weight * float("nan"), site(torch.ones(40), torch.ones(72)))
    for options in ("ratio=0", "factor_bits=7", "curvature=both", "ratio=nan"):
        with pytest.raises(InputError):
            parse_technique(f"svd_llm:{options}")
