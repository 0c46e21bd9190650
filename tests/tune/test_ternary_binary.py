"""Ternary weights: three levels of the paper's scale, cut into its thirds; and the scale is what helps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.tune.forms import COLUMNS, GRIDS, ROWS, agrees, classifier, normal, rounded

from layerwise.encoding.grid import Grid
from layerwise.tune import _ternary
from layerwise.tune._latent import adam
from layerwise.tune._ternary import ThreeLevels
from layerwise.tune.ternary_binary import TernaryBinary

TWO_BITS = [grid for grid in GRIDS if grid.bits == 2]
ROW = Grid(2, 0, symmetric=True)


@given(st.sampled_from(TWO_BITS), st.integers(0, 1))
def test_three_levels_are_stored_as_they_are_evaluated(grid: Grid, seed: int) -> None:
    weight = normal(ROWS, COLUMNS, seed=seed)
    learned, descend = {"": ThreeLevels(rounded(weight, grid), weight)}, adam(0.3)
    for step in range(3):
        assert agrees(learned[""])
        encoded = learned[""].encoded()
        trits = encoded.codes().float() - (2 if grid.symmetric else 1)
        assert set(trits.unique().tolist()) == {-1.0, 0.0, 1.0}
        (learned[""].weight() * normal(ROWS, COLUMNS, seed=step)).sum().backward()
        descend(learned, 0.0)


def ternary(weight: torch.Tensor) -> torch.Tensor:
    return ThreeLevels(rounded(weight, ROW), weight).weight().detach()


def test_it_is_equivariant() -> None:
    weight = normal(ROWS, COLUMNS)
    assert torch.equal(ternary(-weight), -ternary(weight))
    assert torch.equal(ternary(weight * 8), ternary(weight) * 8)
    assert not ternary(torch.zeros(ROWS, COLUMNS)).any()


@pytest.mark.parametrize(("kind", "zeros", "energy"), [("uniform", 1 / 3, 0.943), ("gauss", 0.405, 0.820)])
def test_thirds_and_energy(kind: str, zeros: float, energy: float) -> None:
    drawn = torch.rand(4, 40000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    weight = drawn if kind == "uniform" else normal(4, 40000)
    found = ternary(weight)
    assert float((found == 0).float().mean()) == pytest.approx(zeros, abs=0.01)
    assert float(found.std() / weight.std()) == pytest.approx(energy, rel=0.02)


def test_the_gradient_is_straight_through_and_none_flows_through_the_scale() -> None:
    weight, k = normal(ROWS, COLUMNS), normal(ROWS, COLUMNS, seed=1)
    learned = ThreeLevels(rounded(weight, ROW), weight)
    (learned.weight() * k).sum().backward()
    assert learned.shift.grad is not None and torch.equal(learned.shift.grad, k * learned.first)


def test_three_trained_levels_beat_four_given_ones_and_the_scale_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ablation: half of the statistic's scale, with which almost nothing is zero, and twice that, do worse."""
    scope = classifier()
    paper = TernaryBinary(steps=80, rate=0.03).tune(scope)
    assert paper.after == scope.error({**scope.encoded, **paper.encoded}) < 0.8 * paper.before
    others = []
    for share in (2 / 3, 8 / 3):
        monkeypatch.setattr(_ternary, "SHARE", share)
        others.append(TernaryBinary(steps=80, rate=0.03).tune(scope).after)
    assert paper.after < min(others)


def test_other_forms_and_zero_steps() -> None:
    assert not TernaryBinary().touches(rounded(normal(ROWS, COLUMNS), Grid(3, 16)))
    found = TernaryBinary(steps=0).tune(classifier())
    assert found.encoded == {} and found.before == found.after
