"""HQQ: the update of the zeros, where it starts, what it keeps, and what it is worth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.encoding.grid import FittedGrid, Grid, fit_grid, group_of, points, round_to_grid
from layerwise.encoding.integer import GroupedInteger
from layerwise.quantize.hqq import shrink, update_zero
from layerwise.recipe import parse_technique


def encode(options: str, weight: Tensor) -> GroupedInteger:
    encoded = parse_technique(f"hqq:{options}").encode(weight, SiteStatistics.uninformed(*weight.shape))
    assert isinstance(encoded, GroupedInteger)
    return encoded


def heavy_tails(rows: int = 48, columns: int = 128) -> Tensor:
    """0.05 x Student t with 5 degrees of freedom, the card's example."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(6, rows, columns, generator=generator)
    return 0.05 * normal[0] / (normal[1:].square().mean(0)).sqrt()


def group_means(weight: Tensor, encoded: GroupedInteger) -> Tensor:
    """Mean |W - W'| of each group of 64."""
    return (weight - encoded.decode()).abs().view(len(weight), -1, 64).mean(2)


def test_the_update_is_the_least_squares_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    scaled, outliers = torch.randn(5, 3, 16, generator=generator), torch.rand(5, 3, 16, generator=generator)
    codes = torch.randint(0, 16, (5, 3, 16), generator=generator).float()
    zero = update_zero(scaled, codes, outliers)

    def error(z: Tensor) -> Tensor:
        return (scaled - outliers - (codes - z)).square().sum(-1)

    for step in (-0.1, -1e-2, 1e-2, 0.1):
        assert bool((error(zero) < error(zero + step)).all())


def test_the_shrinkage_is_the_papers_formula() -> None:
    error = torch.tensor([0.0, 1e-4, -2.0, 5.0])
    expected = torch.tensor([0.0, 0.0, -(2.0 - 2.0**-0.3 / 10), 5.0 - 5.0**-0.3 / 10])
    torch.testing.assert_close(shrink(error, 0.7, 10.0), expected)


def test_no_iterations_is_the_plain_grid_with_a_real_zero() -> None:
    weight = heavy_tails()
    encoded = encode("bits=3,group=64,iterations=0", weight)
    fitted = fit_grid(weight, Grid(3, 64, float_zero=True))
    assert torch.equal(encoded.fitted.zeros(), fitted.zeros())
    assert torch.equal(encoded.codes(), round_to_grid(weight, fitted))
    # with that zero rounded to a whole number it is RTN, ties aside
    whole = FittedGrid(fitted.grid, 128, fitted.scale, None, (-weight_low(weight) / fitted.steps()).round().half())
    rtn = parse_technique("rtn:bits=3,group=64,clip=false").encode(weight, SiteStatistics.uninformed(*weight.shape))
    assert torch.equal(points(round_to_grid(weight, whole), whole), rtn.decode())


def weight_low(weight: Tensor) -> Tensor:
    return weight.view(len(weight), -1, 64).amin(2).clamp(max=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_group_ends_worse_than_it_began_and_all_end_better(bits: int) -> None:
    weight = heavy_tails()
    before, after = (group_means(weight, encode(f"bits={bits},iterations={k}", weight)) for k in (0, 20))
    assert bool((after <= before * (1 + 1e-4)).all())
    assert float(after.mean()) < {2: 0.95, 3: 0.98, 4: 0.98}[bits] * float(before.mean())


def test_setting_outliers_aside_lowers_the_norm_that_forgives_them() -> None:
    """Ablation: with beta near 0 nothing is set aside (E = 0) and the zeros are fitted to plain squares.

    The shrinkage knows no scale: at weights of ordinary size its threshold is above every error and it does nothing,
    so the weights here are larger.
    """
    weight = heavy_tails() * 100

    def norm(options: str) -> float:
        return float((weight - encode(f"bits=2,{options}", weight).decode()).abs().pow(0.7).mean())

    assert norm("beta=0.3") < 0.995 * norm("beta=0.001")


def test_the_zero_is_judged_as_it_is_stored() -> None:
    encoded = encode("bits=3,group=64", heavy_tails(8, 172))
    assert encoded.fitted.zero is not None and encoded.fitted.zero.dtype == torch.float16
    assert encoded.fitted.scale.shape == (8, 3)
    groups = group_of(172, encoded.grid)
    expected = (encoded.codes().float() - encoded.fitted.zeros()[:, groups]) * encoded.fitted.steps()[:, groups]
    assert torch.equal(encoded.decode(), expected)
