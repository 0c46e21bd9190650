"""Damages of changes that are given a few rows at a time, and what goes with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics, Use
from layerwise.encoding import bitplanes
from layerwise.encoding.finite import all_finite
from layerwise.sensitivity import kronecker
from layerwise.sensitivity.kronecker import damage, damage_of_rows

GENERATOR = torch.Generator().manual_seed(3)


def side(width: int, whole: bool) -> Tensor:
    x = torch.randn(2 * width, width, generator=GENERATOR)
    return x.T @ x if whole else x.square().sum(0)


@pytest.mark.parametrize("rows_whole", [False, True])
@pytest.mark.parametrize("columns_whole", [False, True])
def test_damage_is_the_trace_whatever_is_in_memory(
    rows_whole: bool, columns_whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = torch.randn(50, 12, generator=GENERATOR)
    uses = tuple(
        Use(side(50, rows_whole), c := side(12, columns_whole), c, torch.ones(12), scale, 100) for scale in (0.5, 2.0)
    )
    statistics, wanted = SiteStatistics(uses), 0.0
    for use in uses:
        r, c = (s if s.dim() == 2 else torch.diag(s) for s in (use.rows, use.columns))
        wanted += use.scale * float((r.double() @ change.double() @ c.double() @ change.double().T).trace())
    at_once = damage(change, statistics)
    assert at_once == pytest.approx(wanted, rel=1e-5)
    monkeypatch.setattr(kronecker, "ROWS_AT_ONCE", 7)
    largest = 0

    def read(start: int, stop: int) -> Tensor:
        nonlocal largest
        largest = max(largest, stop - start)
        return change[start:stop]

    assert damage_of_rows(read, 50, statistics) == pytest.approx(at_once, rel=1e-6)
    assert largest == (7 if not rows_whole and not columns_whole else 50)


def test_finite_sums_and_sums_that_overflow() -> None:
    assert all_finite(torch.zeros(0)) and all_finite(torch.tensor([1.0, -2.0]))
    assert all_finite(torch.full((4,), 3e38)), "the sum is infinite and no value is"
    for wrong in (float("nan"), float("inf"), float("-inf")):
        assert not all_finite(torch.tensor([1.0, wrong, -wrong]))
    assert not all_finite(torch.tensor([float("inf"), float("-inf")]))


def test_codes_are_packed_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 8, (23, 10), generator=GENERATOR, dtype=torch.uint8)
    whole = bitplanes.pack(codes, 3)
    monkeypatch.setattr(bitplanes, "PACKED_AT_ONCE", 40)
    assert torch.equal(bitplanes.pack(codes, 3), whole)
