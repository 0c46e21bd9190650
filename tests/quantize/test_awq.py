"""AWQ: the scales by hand, the gain on outlier channels, and that it comes from where the outliers are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics, Use
from layerwise.errors import InputError
from layerwise.network.folds import BlockScope, Fold
from layerwise.quantize.awq import Awq, output_error, power_law

WIDTH, OUTLIERS = 128, (7, 50, 101)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def measured(x: Tensor, absolute: Tensor | None = None) -> SiteStatistics:
    moment = x.T @ x / len(x)
    mean = x.abs().mean(0) if absolute is None else absolute
    return SiteStatistics((Use(torch.ones(64), moment, moment, mean, 1.0, len(x)),))


def inputs(seed: int = 1) -> Tensor:
    """512 tokens with three channels twenty times as large as the others."""
    x = torch.randn(512, WIDTH, generator=generator(seed))
    x[:, list(OUTLIERS)] *= 20
    return x


def scope(statistics: SiteStatistics) -> BlockScope:
    """norm → q, k: two linears that share the norm's output."""
    parameters = {
        "norm.weight": torch.ones(WIDTH) + 0.1 * torch.randn(WIDTH, generator=generator(2)),
        "q.weight": torch.randn(64, WIDTH, generator=generator(3)) * 0.05,
        "k.weight": torch.randn(64, WIDTH, generator=generator(4)) * 0.05,
    }
    fit = {"q": statistics, "k": statistics}
    return BlockScope("block.0", parameters, frozenset(), fit, dict(fit), (Fold("norm", ("q", "k")),))


def rounding_error(found: BlockScope, awq: Awq, x: Tensor) -> float:
    """Output error of q and k after rounding, in the coordinates of what reaches them."""
    return sum(awq.error(found, [c], None) for c in ("q", "k"))


def test_outlier_channels_are_rounded_at_less_than_half_the_error() -> None:
    """The card's synthetic case, 3 bits in groups of 64: relative error 0.0456 falls to 0.0175."""
    awq, x = Awq(), inputs()
    before = scope(measured(x))
    after = awq.rewrite(before)
    rtn, scaled = rounding_error(before, awq, x), rounding_error(after, awq, x)
    assert scaled < 0.5 * rtn
    size = sum(output_error(before.weight(c), before.fit[c]) for c in ("q", "k"))
    assert rtn / size == pytest.approx(0.0456, rel=0.25)
    assert scaled / size == pytest.approx(0.0175, rel=0.35)


def test_the_gain_is_lost_when_the_means_are_permuted() -> None:
    awq, x = Awq(), inputs()
    permuted = x.abs().mean(0)[torch.randperm(WIDTH, generator=generator(9))]
    before = scope(measured(x, permuted))
    assert awq.search(before, before.folds[0]) is None
    assert awq.rewrite(before).parameters == before.parameters  # falls back to doing nothing


def test_the_search_is_never_worse_than_doing_nothing() -> None:
    awq = Awq()
    for seed in range(5):
        before = scope(measured(torch.randn(200, WIDTH, generator=generator(seed))))
        assert rounding_error(awq.rewrite(before), awq, torch.empty(0)) <= rounding_error(before, awq, torch.empty(0))


def test_the_function_of_the_scope_is_kept() -> None:
    x = inputs()
    before = scope(measured(x))
    after = Awq().rewrite(before)
    for name in ("q", "k"):
        expected = (x * before.parameters["norm.weight"]) @ before.weight(name).T
        found = (x * after.parameters["norm.weight"]) @ after.weight(name).T
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_alpha_zero_is_the_identity() -> None:
    assert torch.equal(power_law(torch.rand(9, generator=generator(1)) + 0.1, 0.0), torch.ones(9))


@pytest.mark.parametrize("constant", [2.0**-20, 3.0, 1e6])
def test_multiplying_the_means_by_a_constant_changes_nothing(constant: float) -> None:
    means = torch.rand(64, generator=generator(1))
    for alpha in (0.1, 0.5, 0.95):
        assert torch.allclose(power_law(means * constant, alpha), power_law(means, alpha), rtol=1e-5)


def test_the_factors_are_centred() -> None:
    factor = power_law(torch.rand(64, generator=generator(1)) + 0.01, 0.7)
    assert float(factor.max() * factor.min()) == pytest.approx(1.0, rel=1e-5)


def test_dead_channels_keep_their_columns() -> None:
    x = inputs()
    x[:, :5] = 0
    before = scope(measured(x))
    after = Awq().rewrite(before)
    assert torch.equal(after.weight("q")[:, :5], before.weight("q")[:, :5])
    assert all(bool(torch.isfinite(v).all()) for v in after.parameters.values())


@pytest.mark.parametrize("alive", [0, 1])
def test_hardly_any_input_is_finite(alive: int) -> None:
    x = torch.zeros(10, WIDTH)
    x[:, :alive] = 1e-30
    after = Awq().rewrite(scope(measured(x)))
    assert all(bool(torch.isfinite(v).all()) for v in after.parameters.values())


def test_a_block_without_a_fold_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"awq finds no place in block\.0"):
        Awq().rewrite(replace(scope(measured(inputs())), folds=()))
