"""SparseGPT: against the paper's own update, its identity and bounds, and what compensation is worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.quantize.conftest import loss
from torch import Tensor

from layerwise.encoding.grid import group_of
from layerwise.encoding.signed import FittedSigned
from layerwise.errors import InputError
from layerwise.prune import sparsegpt
from layerwise.prune.sparsegpt import inverse_factor, prune
from layerwise.recipe import parse_technique


def damped(moment: Tensor, share: float = 0.01) -> Tensor:
    moment = moment.double() / moment.diagonal().double().mean()
    return moment + share * torch.eye(len(moment), dtype=torch.float64)


def encode(options: str, weight: Tensor, statistics: Any) -> Any:
    encoder: Any = parse_technique(f"sparsegpt:{options}")
    return encoder.encode(weight, statistics)


def as_in_the_paper(
    weight: Tensor, moment: Tensor, sparsity: float, block: int, pattern: str, fitted: FittedSigned | None = None
) -> tuple[Tensor, Tensor]:
    """The published algorithm in plain torch, column by column: W' and the errors e, float64 [m, n]."""
    upper = torch.linalg.cholesky(torch.linalg.inv(moment), upper=True)
    current, errors = weight.double().clone(), torch.zeros(weight.shape).double()
    rows, columns = weight.shape
    kept = torch.ones(rows, columns, dtype=torch.bool)
    for j in range(columns):
        if pattern == "2:4" and j % 4 == 0:
            score = (current[:, j : j + 4] / upper.diagonal()[j : j + 4]) ** 2
            kept[:, j : j + 4] = torch.zeros_like(score).scatter(1, score.topk(2).indices, 1).bool()
        elif pattern != "2:4" and j % block == 0:
            score = (current[:, j : j + block] / upper.diagonal()[j : j + block]) ** 2
            score = score.reshape(1, -1) if pattern == "matrix" else score
            order = score.argsort(1)[:, : round(sparsity * score.shape[1])]
            kept[:, j : j + block] = torch.ones_like(score).scatter(1, order, 0).bool().view(rows, -1)
        stored = current[:, j].clone()
        if fitted is not None:
            g = group_of(columns, fitted.grid.columns_of(columns))[j]
            sizes = (fitted.floors()[:, g, None] + torch.arange(float(fitted.grid.levels))) * fitted.steps()[:, g, None]
            nearest = (sizes.double() - stored.abs()[:, None]).abs().argmin(1)
            stored = stored.sign() * sizes.gather(1, nearest[:, None])[:, 0].double()
        stored = torch.where(kept[:, j], stored, 0)
        errors[:, j] = (current[:, j] - stored) / upper[j, j]
        current[:, j:] -= errors[:, j, None] * upper[j, j:]
        current[:, j] = stored
    return current, errors


@pytest.mark.parametrize("pattern", ["matrix", "row", "2:4"])
@pytest.mark.parametrize("bits", [16, 1, 3])
def test_it_is_the_papers_update(
    pattern: str, bits: int, weight: Tensor, moments: Any, site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparsegpt, "TILE", 24)
    weight[0, 0] = 1  # what no kept value may outgrow; compensation here reaches 0.4
    fit, _ = moments(72)
    encoded = encode(f"pattern={pattern},bits={bits},group=32,block=24", weight, site(torch.ones(40), fit))
    expected, errors = as_in_the_paper(weight, damped(fit), 0.5, 24, pattern, encoded.fitted)
    decoded = encoded.decode()
    assert torch.equal(decoded != 0, expected != 0)
    torch.testing.assert_close(decoded.double(), expected, rtol=1e-3 if bits == 16 else 1e-6, atol=1e-7)
    # and the identity tr(D H D^T) = sum e^2, for the damped H
    assert loss(expected - weight.double(), damped(fit)) == pytest.approx(float((errors**2).sum()), rel=1e-9)
    assert loss(decoded - weight, damped(fit)) == pytest.approx(float((errors**2).sum()), rel=2e-3)


@pytest.mark.parametrize("pattern", ["matrix", "row"])
def test_blocks_and_runs_of_rows_lose_exactly_what_they_must(
    pattern: str, weight: Tensor, moments: Any, site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwise.encoding.grid.CHUNK", 72 * 7)
    for sparsity in (0.1, 0.33, 0.5, 0.95):
        options = f"sparsity={sparsity},pattern={pattern},block=28"
        kept = encode(options, weight, site(torch.ones(40), moments(72)[0])).kept
        assert kept == (round((1 - sparsity) * 2880) if pattern == "matrix" else 40 * round((1 - sparsity) * 72))


def test_refitting_the_kept_entries_bounds_it_from_below(weight: Tensor, moments: Any) -> None:
    """On its own mask, least squares is what no compensation can pass; without any the error is far above it."""
    fit, _ = moments(72)
    moment = damped(fit)
    pruned, mask, _ = prune(weight, inverse_factor(fit, 0.01, weight), 0.5, "row", 16)
    best = 0.0
    for row, kept in zip(weight.double(), mask, strict=True):
        gone = ~kept  # min over D_kept of D H D^T with D_gone = -W_gone: the Schur complement
        a, b, c = moment[gone][:, gone], moment[gone][:, kept], moment[kept][:, kept]
        best += float(row[gone] @ (a - b @ torch.linalg.solve(c, b.T)) @ row[gone])
    mask_only = loss(torch.where(mask, weight, 0) - weight, moment)
    assert best <= loss(pruned - weight, moment) < 0.6 * mask_only


@pytest.mark.parametrize("pattern", ["matrix", "row", "2:4"])
def test_uncorrelated_inputs_alike_make_it_magnitude_pruning(pattern: str, weight: Tensor, site: Any) -> None:
    plain: Any = parse_technique(f"magnitude:pattern={pattern}")
    for columns in (torch.eye(72), torch.ones(72), torch.zeros(72, 72)):
        known = site(torch.ones(40), columns)
        ours = encode(f"pattern={pattern},block=72", weight, known).decode()
        assert torch.equal(ours, plain.encode(weight, known).decode())


@pytest.mark.parametrize("pattern", ["matrix", "2:4"])
@pytest.mark.parametrize("bits", [16, 2])
def test_compensation_is_what_lowers_the_error_on_other_tokens(
    pattern: str, bits: int, weight: Tensor, moments: Any, site: Any
) -> None:
    """Ablation: the same technique told only the diagonal of H passes nothing on."""
    fit, held = moments(72)
    ours, alone = (
        loss(encode(f"pattern={pattern},bits={bits}", weight, site(torch.ones(40), h)).decode() - weight, held)
        for h in (fit, torch.diag(fit.diagonal()))
    )
    assert ours < 0.75 * alone


def test_rounding_inside_the_pass_beats_rounding_after_it(weight: Tensor, moments: Any, site: Any) -> None:
    from layerwise.encoding.signed import round_signed
    from layerwise.encoding.sparse import Sparse

    fit, held = moments(72)
    joint = encode("bits=2,group=0", weight, site(torch.ones(40), fit))
    pruned, mask, _ = prune(weight, inverse_factor(fit, 0.01, weight), 0.5, "matrix", 16)
    after = Sparse.from_codes(round_signed(pruned, joint.fitted), mask, "mask", joint.fitted)
    assert loss(joint.decode() - weight, held) < 0.8 * loss(after.decode() - weight, held)


def test_the_order_of_the_family_on_correlated_inputs(weight: Tensor, moments: Any, site: Any) -> None:
    fit, held = moments(72)
    known = site(torch.ones(40), fit)
    for sparsity in (0.5, 0.7):
        found = []
        for name in ("sparsegpt", "wanda", "magnitude"):
            encoder: Any = parse_technique(f"{name}:sparsity={sparsity}")
            found.append(loss(encoder.encode(weight, known).decode() - weight, held))
        assert found == sorted(found)


def test_an_input_that_no_token_reached_is_pruned_like_the_mean(weight: Tensor, moments: Any) -> None:
    fit = moments(72)[0].clone()
    fit[5], fit[:, 5] = 0, 0
    upper = inverse_factor(fit, 0.01, weight)
    pruned, mask, _ = prune(weight, upper, 0.5, "row", 16)
    kept = mask[:, 5]
    assert 0.1 < float(kept.float().mean()) < 0.95
    torch.testing.assert_close(pruned[kept, 5], weight[kept, 5])  # it takes nobody's errors


def test_damping_rises_until_a_singular_moment_factors(weight: Tensor, moments: Any) -> None:
    vector = torch.randn(72, generator=torch.Generator().manual_seed(0)) * 1e8
    upper = inverse_factor(torch.outer(vector, vector), 0.0, weight)
    assert bool(torch.isfinite(upper).all()) and bool((upper.diagonal() > 0).all())
    fit, _ = moments(72)
    upper = inverse_factor(fit, 0.02, weight)
    torch.testing.assert_close(torch.linalg.inv(upper.T @ upper), damped(fit, 0.02))


def test_a_table_of_many_rows_is_pruned_too(moments: Any, site: Any) -> None:
    """Rows are entries; a table's statistics have diagonal rows and whole columns."""
    table = torch.randn(3000, 16, generator=torch.Generator().manual_seed(0))
    for pattern in ("matrix", "row", "2:4"):
        encoded = encode(f"pattern={pattern},bits=3,group=0", table, site(torch.ones(3000), moments(16)[0]))
        index = torch.tensor([2999, 5, 5])
        assert torch.equal(encoded.take_rows(index), encoded.decode()[index])


def test_statistics_of_another_shape_are_refused(weight: Tensor, site: Any) -> None:
    for columns in (torch.eye(71), torch.full((72, 72), float("nan")), torch.ones(71)):
        with pytest.raises(InputError, match="72 inputs"):
            encode("", weight, site(torch.ones(40), columns))
