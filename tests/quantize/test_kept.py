"""A weight that lies on a grid is stored on it without a new rounding; any other is rounded as plainly as can be."""

from __future__ import annotations

import pytest
import torch

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.quantize.kept import Kept
from layerwise.recipe import parse_recipe


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 32, 24])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_grid_is_found_again(bits: int, group: int, symmetric: bool) -> None:
    weight = torch.randn(13, 100, generator=torch.Generator().manual_seed(bits)) * 0.05
    weight[3] = 0
    weight[4, 1:] = 0  # one level alone
    nothing = SiteStatistics.uninformed(13, 100)
    recipe = f"rtn:bits={bits},group={group},symmetric={str(symmetric).lower()}"
    stored = parse_recipe(recipe).encoder.encode(weight, nothing)
    again = Kept(bits=bits, group=group, symmetric=symmetric).encode(stored.decode(), nothing)
    assert torch.equal(again.decode(), stored.decode())
    assert again.nbytes == stored.nbytes and again.spec() == stored.spec()


def test_without_looking_for_the_grid_the_weight_changes() -> None:
    """The ablation: a grid fitted to the range of a group that does not use all of its levels is another grid."""
    draw = torch.Generator().manual_seed(0)
    steps = torch.rand(16, 1, generator=draw).half().float().repeat(1, 64)
    stored = steps * torch.randint(-5, 6, (16, 64), generator=draw)
    nothing = SiteStatistics.uninformed(16, 64)
    plain = parse_recipe("rtn:bits=4,group=32,clip=false").encoder.encode(stored, nothing).decode()
    assert not torch.equal(plain, stored)
    assert torch.equal(Kept(bits=4, group=32).encode(stored, nothing).decode(), stored)


def test_what_lies_on_no_grid_is_rounded() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    nothing = SiteStatistics.uninformed(16, 64)
    found = Kept(bits=4, group=32).encode(weight, nothing).decode()
    plain = parse_recipe("rtn:bits=4,group=32,clip=false").encoder.encode(weight, nothing).decode()
    assert torch.equal(found, plain)
