"""Clipping a static range where the output is best."""

from __future__ import annotations

from dataclasses import replace

import torch

from layerwise.calibrate.input_ranges import InputRanges
from layerwise.encoding.inputs import InputGrid
from layerwise.quantize.repquant_clip import RepquantClip

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(256, 32, generator=DRAW)
X[0, 0], X[1, 1] = 25.0, -9.0
WEIGHT = torch.randn(16, 32, generator=DRAW)
RANGES = replace(InputRanges.of(X), weight=WEIGHT)


def error(grid: InputGrid) -> float:
    return float(((grid.rounded(X) - X) @ WEIGHT.T).square().sum())


def test_clipping_beats_the_whole_range() -> None:
    whole = RepquantClip(bits=4, steps=1).grid(RANGES)
    clipped = RepquantClip(bits=4).grid(RANGES)
    assert error(clipped) < 0.5 * error(whole)


def test_both_ends_are_clipped_apart() -> None:
    grid = RepquantClip(bits=4).grid(RANGES)
    step, zero = (grid.tensors()[name].float() for name in ("_scale", "_zero"))
    low, high = float(-zero * step), float((15 - zero) * step)
    assert -9 < low < -2 and 2 < high < 12 and abs(low + high) > 0.1


def test_the_matrix_decides() -> None:
    """A channel that the matrix does not read may be clipped away; without the matrix it may not."""
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(5))
    x[:, 3] *= 40
    blind = WEIGHT.clone()
    blind[:, 3] = 0
    ranges = InputRanges.of(x)
    found = [RepquantClip(bits=4).grid(replace(ranges, weight=w)).tensors()["_scale"] for w in (blind, WEIGHT, None)]
    assert float(found[0]) < 0.25 * float(found[1]) and float(found[0]) < 0.25 * float(found[2])


def test_a_range_without_outliers_is_kept_at_eight_bits() -> None:
    x = torch.rand(200, 8, generator=DRAW) * 2 - 1
    found = RepquantClip().grid(InputRanges.of(x)).tensors()
    whole = RepquantClip(steps=1).grid(InputRanges.of(x)).tensors()
    assert float(found["_scale"]) >= 0.9 * float(whole["_scale"])
