"""Steps that are 8-bit floats are no whole multiples of a factor: no tuner takes them for such."""

from __future__ import annotations

import pytest
from tests.tune.forms import COLUMNS, ROWS, normal, rounded

from layerwise.encoding.grid import Grid
from layerwise.recipe import parse_tuner
from layerwise.roles import Tuner
from layerwise.technique import names


@pytest.mark.parametrize("name", names(Tuner))
def test_float_steps_are_left_alone(name: str) -> None:
    tuner, weight = parse_tuner(name), normal(ROWS, COLUMNS)
    assert tuner.touches(rounded(weight, Grid(2, 16, scale_bits=8)))
    assert not tuner.touches(rounded(weight, Grid(2, 16, symmetric=True, scale_bits=8, float_scale=True)))
