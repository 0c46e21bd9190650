"""What rows have in common: taken out without a change of the loss, worth it where it is, harmless where it is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics, Use
from layerwise.encoding.centred import Centred
from layerwise.quantize import _centring
from layerwise.quantize._centring import common_part, divided
from layerwise.recipe import parse_technique
from layerwise.sensitivity.kronecker import damage

ROWS, COLUMNS = 256, 64
TRELLIS = "trellis:bits=4,group=0,refits=0"


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics(seed: int = 1) -> SiteStatistics:
    """A table's: rows that stand alone, some of which count much more."""
    inputs = normal(300, COLUMNS, seed=seed) * (1 + torch.arange(COLUMNS) / 20)
    moment = inputs.T @ inputs / 300
    rows = normal(ROWS, seed=seed + 1).mul(1.5).exp()
    return SiteStatistics((Use(rows, moment, moment, inputs.abs().mean(0), 0.5, 300),))


def table(common: float) -> Tensor:
    """Rows of different sizes, and ``common`` times one direction of a few large entries in all of them."""
    sizes = normal(ROWS, 1, seed=3).mul(0.3).exp()
    return sizes * (normal(ROWS, COLUMNS, seed=4) + common * normal(COLUMNS, seed=5) ** 3)


def error(recipe: str, weight: Tensor, known: SiteStatistics) -> float:
    return damage(parse_technique(recipe).encode(weight, known).decode() - weight, known)  # type: ignore[attr-defined]


def test_an_error_counts_the_same_before_and_after_columns_are_divided() -> None:
    known, change = statistics(), normal(ROWS, COLUMNS, seed=6)
    factor = (normal(COLUMNS, seed=7).abs() + 0.3).half()
    there = divided(known, factor)
    assert damage(change / factor.float(), there) == pytest.approx(damage(change, known), rel=1e-5)
    assert divided(known, factor) is there


def test_it_is_the_plain_trellis_of_what_is_left() -> None:
    weight, known = table(1.0), statistics()
    found = parse_technique(TRELLIS + ",centred=true").encode(weight, known)  # type: ignore[attr-defined]
    factor, offset = common_part(weight, known)
    assert isinstance(found, Centred) and torch.equal(found.factor, factor) and torch.equal(found.offset, offset)
    rest = (weight - offset.float()) / factor.float()
    alone = parse_technique(TRELLIS).encode(rest, divided(known, factor))  # type: ignore[attr-defined]
    assert torch.equal(found.part.decode(), alone.decode())


def test_what_rows_have_in_common_costs_nothing_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the damage and less; without the offset, or without the factor, that is lost."""
    weight, known = table(1.0), statistics()
    plain, ours = error(TRELLIS, weight, known), error(TRELLIS + ",centred=true", weight, known)
    assert ours < 0.5 * plain
    whole = common_part
    for place, instead in ((1, torch.zeros(COLUMNS)), (0, torch.ones(COLUMNS))):
        monkeypatch.setattr(
            _centring,
            "common_part",
            lambda w, s, p=place, i=instead: tuple(i.half() if n == p else t for n, t in enumerate(whole(w, s))),
        )
        without = error(TRELLIS + ",centred=true", weight, known)
        assert without > 1.02 * ours, (place, without, ours)


def test_rows_without_anything_in_common_lose_nothing() -> None:
    weight, known = table(0.0), statistics()
    assert error(TRELLIS + ",centred=true", weight, known) < 1.03 * error(TRELLIS, weight, known)


@pytest.mark.parametrize("kind", ["zeros", "constant", "same rows", "a constant column", "huge", "tiny"])
def test_degenerate_tables_decode_to_numbers_near_them(kind: str) -> None:
    weight = normal(ROWS, COLUMNS, seed=8)
    weight = {
        "zeros": torch.zeros_like(weight),
        "constant": torch.full_like(weight, 0.7),
        "same rows": weight[:1].expand(ROWS, -1).contiguous(),
        "a constant column": torch.cat([weight[:, 1:], torch.full((ROWS, 1), 3.0)], 1),
        "huge": weight * 1e3,
        "tiny": weight * 1e-5,
    }[kind]
    found = parse_technique(TRELLIS + ",centred=true").encode(weight, statistics()).decode()  # type: ignore[attr-defined]
    assert bool(torch.isfinite(found).all())
    assert float((found - weight).norm()) <= 0.12 * float(weight.norm()) + 1e-6


def test_pieces_of_rows_give_the_same_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, known = table(1.0), statistics()
    factor, offset = common_part(weight, known)
    monkeypatch.setattr("layerwise.encoding.grid.CHUNK", 1000)
    again = common_part(weight, known)
    torch.testing.assert_close(again[0], factor, rtol=1e-3, atol=0)
    torch.testing.assert_close(again[1], offset, rtol=1e-3, atol=1e-4)
