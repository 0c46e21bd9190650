"""An encoding whose damage nobody compares is tried on some rows; where that does not speak for it, on all."""

from __future__ import annotations

import pytest
import torch

from layerwise.calibrate.statistics import SiteStatistics, Use
from layerwise.errors import InputError
from layerwise.plan.candidates import ROWS_TRIED, encode_candidate
from layerwise.quantize.rtn import Rtn


def measured(rows: int, columns: int, whole: bool = False) -> SiteStatistics:
    x = torch.randn(4 * columns, columns, generator=torch.Generator().manual_seed(1))
    h = x.T @ x / len(x)
    side = torch.eye(rows) if whole else torch.ones(rows)
    return SiteStatistics((Use(side, h, h, torch.ones(columns), 1.0, 100),))


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(3 * ROWS_TRIED, 64, generator=torch.Generator().manual_seed(0))


def test_what_helps_is_not_judged_further(weight: torch.Tensor) -> None:
    statistics = measured(*weight.shape)
    compared, tried = (
        encode_candidate("site", weight, "rtn:bits=4,group=32", statistics, statistics, compared=compared)
        for compared in (True, False)
    )
    assert compared.damage > 0 and tried.damage == 0
    assert all(torch.equal(a, tried.encoded.tensors()[k]) for k, a in compared.encoded.tensors().items())


def test_what_does_harm_is_judged_on_every_row(weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics, encode = measured(*weight.shape), Rtn.encode
    monkeypatch.setattr(Rtn, "encode", lambda self, given, known: encode(self, -given, known))
    exact, tried = (
        encode_candidate("site", weight, "rtn:bits=4,group=32", statistics, statistics, compared=compared).damage
        for compared in (True, False)
    )
    assert tried == exact > 0


def test_rows_that_act_on_each_other_are_judged_together(weight: torch.Tensor) -> None:
    statistics = measured(*weight.shape, whole=True)
    assert encode_candidate("site", weight, "rtn:bits=4,group=32", statistics, statistics, compared=False).damage > 0


def test_every_row_is_looked_at_for_what_is_not_finite(weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerwise.encoding.integer import GroupedInteger

    statistics, decode = measured(*weight.shape), GroupedInteger.decode_rows

    def damaged(self: GroupedInteger, start: int, stop: int) -> torch.Tensor:
        out = decode(self, start, stop)
        if start <= 1 < stop:
            out[1 - start, 0] = float("nan")
        return out

    monkeypatch.setattr(GroupedInteger, "decode_rows", damaged)
    with pytest.raises(InputError, match="not finite at site"):
        encode_candidate("site", weight, "rtn:bits=4,group=32", statistics, statistics, compared=False)
