"""The fit on samples whose exponent is known, and what choosing the threshold is for."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from layerwise.probe._power_law import determinant_tail, fit_tail, hill

Sample = NDArray[np.float64]


def pareto(count: int, alpha: float, seed: int) -> Sample:
    """Values of density proportional to ``l^-alpha`` above one, ascending."""
    return np.sort(np.random.default_rng(seed).random(count) ** (-1 / (alpha - 1)))


def with_bulk(seed: int) -> Sample:
    """500 values of exponent 2.5 above one, and a bulk of 2000 between 0.6 and 1 that follows no power law."""
    bulk = np.random.default_rng(seed + 1000).uniform(0.6, 1.0, 2000)
    return np.sort(np.concatenate([bulk, pareto(500, 2.5, seed)]))


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_a_pure_power_law_is_found(alpha: float) -> None:
    fits = [fit_tail(pareto(1000, alpha, seed)) for seed in range(20)]
    mean = np.mean([f.alpha for f in fits if f])
    assert abs(mean - alpha) < 0.05 * (alpha - 1)
    assert all(f is not None and f.doubt is None for f in fits)


def test_the_formula_above_the_chosen_threshold() -> None:
    values = pareto(300, 2.5, 3)
    fit = fit_tail(values)
    assert fit is not None
    tail = values[values >= fit.xmin]
    assert fit.count == len(tail)
    assert fit.alpha == pytest.approx(1 + len(tail) / np.log(tail / fit.xmin).sum(), rel=1e-12)
    expected = 1 - (tail / fit.xmin) ** (1 - fit.alpha)
    assert fit.distance == pytest.approx(np.abs(expected - np.arange(len(tail)) / len(tail)).max(), rel=1e-9)


def test_no_other_threshold_lies_closer() -> None:
    values = pareto(120, 2.2, 5)
    fit = fit_tail(values)
    assert fit is not None
    for xmin in values[:-2]:
        tail = values[values >= xmin]
        alpha = 1 + len(tail) / np.log(tail / xmin).sum()
        distance = np.abs(1 - (tail / xmin) ** (1 - alpha) - np.arange(len(tail)) / len(tail)).max()
        assert distance >= fit.distance - 1e-12


def test_choosing_the_threshold_is_what_finds_the_exponent_behind_a_bulk() -> None:
    """Taken out, the exponent is far off: over all values, and with the threshold fixed at the median."""
    chosen, whole, median = [], [], []
    for seed in range(5):
        values = with_bulk(seed)
        for found, fit in ((chosen, fit_tail(values)), (whole, hill(values, 1.0)), (median, hill(values, 0.5))):
            assert fit is not None
            found.append(fit.alpha)
    assert abs(np.mean(chosen) - 2.5) < 0.1
    assert abs(np.mean(whole) - 2.5) > 0.7
    assert abs(np.mean(median) - 2.5) > 0.7


def test_hill_is_the_mean_logarithm_above_the_next_value() -> None:
    values = pareto(100, 3.0, 1)
    fit = hill(values, 0.25)
    assert fit is not None and fit.count == 25
    assert fit.alpha == pytest.approx(1 + 25 / np.log(values[75:] / values[74]).sum(), rel=1e-12)


@pytest.mark.parametrize("values", [np.ones(80), np.array([3.0, 3.0]), np.array([2.0])], ids=len)
def test_values_that_do_not_differ_have_no_exponent(values: Sample) -> None:
    assert fit_tail(values) is None
    assert hill(values, 0.5) is None


def test_a_light_tail_is_not_given_an_exponent() -> None:
    values = np.sort(np.random.default_rng(2).uniform(1, 2, 60))
    fit = fit_tail(values)
    assert fit is not None and fit.doubt is not None


def test_the_determinant_condition_by_products() -> None:
    values = np.sort(np.random.default_rng(4).exponential(size=60))
    count, start = determinant_tail(values)
    scaled = np.sort(values / values.mean())[::-1]
    assert start == pytest.approx(scaled[count - 1])
    assert np.prod(scaled[:count]) >= 1 > np.prod(scaled[: count + 1])
    assert determinant_tail(np.ones(10)) == (10, 1.0)
