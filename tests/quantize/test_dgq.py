"""DGQ's groups of channels: the algebra of its ends, and that like ranges belong together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from layerwise.calibrate.input_ranges import InputRanges
from layerwise.calibrate.statistics import SiteStatistics
from layerwise.encoding.input_product import input_product
from layerwise.encoding.inputs import GroupGrid
from layerwise.encoding.integer import GroupedInteger
from layerwise.errors import InputError
from layerwise.quantize.dgq import Dgq, clusters, spreads
from layerwise.recipe import parse_recipe


def outlying(seed: int = 0) -> Tensor:
    """256 channels, 6 of them 30 times as large: the card's example."""
    x = torch.randn(400, 256, generator=torch.Generator().manual_seed(seed))
    x[:, ::43] *= 30
    return x


def grid(x: Tensor, **options: int) -> GroupGrid:
    made = Dgq(**options).grid(InputRanges.of(x))
    assert isinstance(made, GroupGrid)
    return made


def error(made: GroupGrid, x: Tensor, channels: Tensor | slice = slice(None)) -> float:
    found = (made.rounded(x) - x)[:, channels]
    return float(found.square().sum() / x[:, channels].square().sum())


def affine(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """The textbook asymmetric grid, written independently."""
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    return scale * (((x / scale).round() + zero).clamp(0, 2**bits - 1) - zero)


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_one_group_is_the_tensor_and_as_many_as_channels_are_channels(bits: int) -> None:
    x = outlying()
    tensor = affine(x, x.min(), x.max(), bits)
    assert torch.allclose(grid(x, bits=bits, groups=1).rounded(x), tensor, atol=1e-5 * float(x.abs().max()))
    channels = affine(x, x.amin(0), x.amax(0), bits)
    every = grid(x, bits=bits, groups=0)
    assert torch.allclose(every.rounded(x), channels, atol=1e-5 * float(x.abs().max()))
    assert every.spec() == grid(x, bits=bits, groups=256).spec()


def test_groups_are_contiguous_partial_products_after_a_permutation() -> None:
    x = outlying()[:9]
    made = grid(outlying(), bits=8, groups=4)
    weight = torch.randn(5, 256, generator=torch.Generator().manual_seed(3))
    form = parse_recipe("rtn:bits=8,group=0").encoder.encode(weight, SiteStatistics.uninformed(5, 256))
    assert isinstance(form, GroupedInteger)
    given = made.quantize(x)
    assert given.zero is not None
    order = made.group.long().argsort(stable=True)
    total = torch.zeros(9, 5, dtype=torch.float64)
    for group in range(4):
        members = order[made.group.long()[order] == group]
        codes = given.codes[:, members].double() - made.group_zero[group].double()
        total += made.group_scale[group].double() * codes @ form.decode()[:, members].double().T
    assert torch.allclose(input_product(given, form), total, rtol=1e-6, atol=1e-6 * float(total.abs().max()))


def test_groups_take_the_outliers_out_of_the_others_scale() -> None:
    """The paper's idea against the same grid without it, and against groups that are not of like range."""
    x = outlying()
    whole, two, eight = (grid(x, bits=6, groups=k) for k in (1, 2, 8))
    small = torch.arange(256) % 43 != 0
    assert error(two, x) < 0.1 * error(whole, x)
    assert error(eight, x, small) < 0.6 * error(two, x, small)
    shuffled = two.group[torch.randperm(256, generator=torch.Generator().manual_seed(1))]
    ranges = InputRanges.of(x)
    ends = [
        torch.stack([side[shuffled == g].aminmax()[i] for g in range(2)])
        for i, side in enumerate((ranges.low, ranges.high))
    ]
    assert error(two, x) < 0.1 * error(GroupGrid.between(ends[0], ends[1], shuffled, 6), x)


def test_equal_channels_and_dead_ones_leave_groups_empty() -> None:
    x = torch.zeros(5, 12)
    x[:, 3] = torch.linspace(-1, 2, 5)
    made = grid(x, bits=8, groups=8)
    assert bool(made.rounded(x).isfinite().all()) and error(made, x) < 1e-4
    assert len(made.group_scale) == 8


def test_clusters_are_those_of_an_obvious_split() -> None:
    points = torch.tensor([[-1.0, 1.0], [-1.1, 0.9], [-30.0, 30.0], [-1.0, 1.1], [-31.0, 29.0]])
    found = clusters(points, 2)
    assert found.tolist() == [0, 0, 1, 0, 1]
    assert torch.equal(clusters(points * 1e30, 2), found)


def test_the_axis_with_the_larger_spread() -> None:
    ranges = replace(
        InputRanges.of(outlying()), position_low=torch.full((4,), -3.0), position_high=torch.full((4,), 3.0)
    )
    channels, positions = spreads(ranges)
    assert channels > positions == 0


def test_too_many_channels_for_a_scale_each() -> None:
    with pytest.raises(InputError, match="groups=0 asks for a scale for each of 300 channels"):
        Dgq(groups=0).layout(300)
