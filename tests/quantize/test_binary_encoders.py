"""BiViT's binary rows and PTQ1.61's mixture: closed forms against searches, ablations, and real bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.quantize.conftest import loss
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics, Use
from layerwise.quantize.ptq161 import rows_of_least_error
from layerwise.recipe import parse_technique


def encoded(recipe: str, weight: Tensor, statistics: SiteStatistics | None = None) -> Any:
    made: Any = parse_technique(recipe)
    return made.encode(weight, statistics or SiteStatistics.uninformed(*weight.shape))


def normal(rows: int = 128, columns: int = 512) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def outlying() -> SiteStatistics:
    """Every eighth of 72 inputs is ten times as large as the others."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(600, 72, generator=generator) * torch.where(torch.arange(72) % 8 == 0, 10.0, 1.0)
    columns = x.T @ x / len(x)
    return SiteStatistics((Use(torch.eye(40), columns, columns, x.abs().mean(0), 1.0, 600),))


def test_a_sign_alone_leaves_what_the_card_says() -> None:
    weight = normal()
    for recipe in ("bivit:fit=false,centred=false", "bivit"):
        error = float((encoded(recipe, weight).decode() - weight).square().sum() / weight.square().sum())
        assert error == pytest.approx(0.363, rel=0.02)


def test_plain_rows_are_the_papers_formula(weight: Tensor) -> None:
    shifted = weight + torch.linspace(-0.05, 0.05, 40)[:, None]
    form = encoded("bivit:fit=false", shifted)
    mean = shifted.double().mean(1)
    scale = (shifted.double() - mean[:, None]).abs().mean(1)
    torch.testing.assert_close(form.scales.values()[:, 0], scale.float(), rtol=1e-3, atol=0)
    torch.testing.assert_close(form.mean.float(), mean.float(), rtol=1e-3, atol=1e-6)
    assert torch.equal(form.codes() == 1, shifted >= form.mean.float()[:, None])


def test_centring_pays_where_rows_have_a_mean(weight: Tensor) -> None:
    shifted = weight + torch.linspace(-0.05, 0.05, 40)[:, None]
    centred, plain = (
        (encoded(f"bivit:fit=false,centred={c}", shifted).decode() - shifted).square().sum() for c in ("true", "false")
    )
    assert centred < 0.85 * plain


def test_the_fitted_scale_is_the_best_of_a_line_search_for_its_signs(weight: Tensor, outlying: SiteStatistics) -> None:
    form = encoded("bivit:centred=false", weight, outlying)
    h, signs = outlying.columns.diagonal().double(), form.codes().double() * 2 - 1
    tried = form.scales.values().double() * torch.linspace(0.8, 1.2, 401).double()  # [rows, tried]
    errors = (weight.double()[:, None] - tried[..., None] * signs[:, None]).square() @ h
    assert bool((errors[:, 200] <= errors.amin(1) * (1 + 1e-5)).all())
    fitted, plain = (
        float((encoded(f"bivit:fit={f}", weight, outlying).decode() - weight).square().double().sum(0) @ h)
        for f in ("true", "false")
    )
    assert fitted < plain


def test_two_unknowns_a_row_solve_the_least_squares() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, bend, h = (torch.rand(s, generator=generator).double() + 0.2 for s in ((6, 30), (30,), (30,)))
    signs = torch.where(torch.rand(6, 30, generator=generator) > 0.5, 1.0, -1.0).double()
    zero = torch.zeros(6).double()
    mean, scale = rows_of_least_error(weight, bend, signs, h, zero, zero)
    root = h.sqrt()
    for i in range(6):
        a = torch.stack([bend * root, bend * signs[i] * root], 1)
        expected = torch.linalg.lstsq(a, (weight[i] * root)[:, None]).solution[:, 0]
        if expected[1] >= 0:
            torch.testing.assert_close(torch.stack([mean[i], scale[i]]), expected)


def error_of(recipe: str, weight: Tensor, known: SiteStatistics) -> float:
    return loss(encoded(recipe, weight, known).decode() - weight, known.columns, known.rows)


def test_salient_columns_are_those_of_large_inputs_and_of_the_promised_number(
    weight: Tensor, outlying: SiteStatistics
) -> None:
    for salience in ("mean", "square", "loss"):
        form = encoded(f"ptq161:share=0.125,salience={salience}", weight, outlying)
        assert form.mask.nonzero()[:, 0].tolist() == list(range(0, 72, 8))
    assert int(encoded("ptq161", weight, outlying).mask.sum()) == round(0.2 * 72)
    ties = encoded("ptq161:share=0.5", weight)  # nothing known: every column alike
    assert int(ties.mask.sum()) == 36 and bool(ties.mask[:36].all())


def test_random_columns_and_no_rank_one_fit_are_worse(weight: Tensor, outlying: SiteStatistics) -> None:
    """Ablations: salience that knows nothing, and r1 = r2 = 1 with plain averages."""
    bent = weight * torch.linspace(0.4, 2, 72)  # what a rank-one correction is for
    found = error_of("ptq161:share=0.125", bent, outlying)
    blind = SiteStatistics((Use(torch.eye(40), outlying.columns, outlying.columns, torch.ones(72), 1.0, 600),))
    assert found < 0.3 * error_of("ptq161:share=0.125", bent, blind)
    assert found < 0.85 * error_of("ptq161:share=0.125,rounds=0", bent, outlying)
    assert error_of("ptq161:share=0.125,feedback=true", bent, outlying) < found


def test_more_salient_columns_are_better_and_bytes_are_the_formula(weight: Tensor, outlying: SiteStatistics) -> None:
    errors = [error_of(f"ptq161:share={share}", weight, outlying) for share in (0.0, 0.125, 0.5)]
    assert errors[0] > errors[1] > errors[2]
    form: Any = encoded("ptq161:share=0.125", weight, outlying)
    count, rows, columns = 9, 40, 72
    codes = rows * (-(-count * 4 // 8) + -(-(columns - count) // 8))
    assert form.nbytes == codes + rows * (2 + 1 + 2 + 2) + columns // 8 + 2 * (columns - count)
    assert encoded("ptq161:share=0", weight, outlying).form == "binary"


def test_an_equal_matrix_comes_back_and_one_column_is_binary() -> None:
    assert encoded("ptq161", torch.ones(3, 1)).form == "binary"
    equal = torch.full((4, 20), 0.5)
    torch.testing.assert_close(encoded("ptq161", equal).decode(), equal, rtol=1e-3, atol=0)
