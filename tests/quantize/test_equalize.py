"""Cross-layer equalisation: equal ranges, the same function, and less error where one scale is shared by all rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from layerwise.errors import InputError
from layerwise.network.folds import BlockScope, Fold
from layerwise.quantize.equalize import Equalize

WIDTH, HIDDEN = 24, 40


def scope(seed: int = 1) -> BlockScope:
    """first → relu → second, with channels that differ a hundredfold on one side."""
    draw = torch.Generator().manual_seed(seed)
    uneven = 10 ** (torch.rand(HIDDEN, generator=draw) * 2 - 1)
    parameters = {
        "first.weight": torch.randn(HIDDEN, WIDTH, generator=draw) * uneven[:, None],
        "first.bias": torch.randn(HIDDEN, generator=draw),
        "second.weight": torch.randn(WIDTH, HIDDEN, generator=draw),
    }
    return BlockScope("block.0", parameters, frozenset(), {}, {}, (Fold("first", ("second",)),))


def run(found: BlockScope, x: Tensor) -> Tensor:
    p = found.parameters
    return (x @ p["first.weight"].T + p["first.bias"]).relu() @ p["second.weight"].T


def test_both_sides_of_a_channel_get_the_same_range() -> None:
    before = scope()
    after = Equalize().rewrite(before)
    rows = after.weight("first").abs().amax(1)
    columns = after.weight("second").abs().amax(0)
    assert torch.allclose(rows, columns, rtol=1e-5)
    old = (before.weight("first").abs().amax(1) * before.weight("second").abs().amax(0)).sqrt()
    assert torch.allclose(rows, old, rtol=1e-5)
    x = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(run(after, x), run(before, x), rtol=1e-4, atol=1e-4)
    again = Equalize().rewrite(after)
    assert all(torch.allclose(again.parameters[n], v, rtol=1e-5) for n, v in after.parameters.items())


def test_one_scale_for_a_whole_matrix_then_costs_less() -> None:
    x = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(2))
    before = scope()

    def error(found: BlockScope) -> float:
        rounded = dict(found.parameters)
        for name in ("first.weight", "second.weight"):
            step = rounded[name].abs().max() / 127
            rounded[name] = (rounded[name] / step).round() * step
        wanted = run(before, x)
        return float((run(replace(found, parameters=rounded), x) - wanted).norm() / wanted.norm())

    assert error(Equalize().rewrite(before)) < 0.8 * error(before)


def test_dead_channels_stay_and_norms_are_no_pair() -> None:
    before = scope()
    before.parameters["first.weight"][3] = 0
    before.parameters["second.weight"][:, 5] = 0
    after = Equalize().rewrite(before)
    assert torch.equal(after.parameters["first.weight"][[3, 5]], before.parameters["first.weight"][[3, 5]])
    norm = replace(before, parameters={"norm.weight": torch.ones(4)}, folds=(Fold("norm", ("second",)),))
    with pytest.raises(InputError, match=r"equalize finds no two matrices in block\.0"):
        Equalize().rewrite(norm)
