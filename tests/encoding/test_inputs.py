"""Grids of inputs: the integer product is the product of the values, and damaged grids are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.encoding.encoded import Encoded
from layerwise.encoding.input_product import input_product
from layerwise.encoding.inputs import GroupGrid, InputGrid, TokenGrid, restore_inputs
from layerwise.encoding.integer import GroupedInteger
from layerwise.errors import InputError
from layerwise.network.packed import PackedLinear
from layerwise.recipe import parse_recipe

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(2, 7, 40, generator=DRAW) * torch.linspace(0.1, 4, 40)
GROUP = torch.arange(40) % 3
GRIDS = (
    TokenGrid(8),
    TokenGrid(4),
    GroupGrid.between(torch.tensor([-3.0, -9.0, 0.0]), torch.tensor([4.0, 8.0, 9.0]), GROUP, 6),
)
RECIPES = (
    "rtn:bits=8,group=16",
    "rtn:bits=4,group=0",
    "rtn:bits=3,group=16,symmetric=true",
    "two_sided:bits=4,group=8",
)


def stored(recipe: str) -> Encoded:
    weight = torch.randn(9, 40, generator=torch.Generator().manual_seed(1))
    return parse_recipe(recipe).encoder.encode(weight, SiteStatistics.uninformed(9, 40))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("grid", GRIDS, ids=("8", "4", "group"))
def test_sums_of_integers_are_the_product_of_the_values(recipe: str, grid: InputGrid) -> None:
    form = stored(recipe)
    assert isinstance(form, GroupedInteger)
    given = grid.quantize(X)
    exact = input_product(given, form)
    # The same in float64 from decoded values: only their own float32 rounding (2^-24 each) is between them.
    decoded = given.values().double() @ form.decode().double().T
    assert float((exact - decoded).abs().max() / decoded.abs().max()) < 3e-7
    packed = PackedLinear(form.spec(), form.tensors(), None, torch.float32, grid.spec(), grid.tensors())
    assert float((packed(X).double() - exact).abs().max() / exact.abs().max()) < 1e-6


def test_a_float_zero_point_has_no_integer_product() -> None:
    form = stored("hqq:bits=4,group=8")
    assert isinstance(form, GroupedInteger) and form.grid.float_zero
    with pytest.raises(InputError, match="whole numbers"):
        input_product(TokenGrid(8).quantize(X), form)


def test_casting_leaves_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERWISE_KERNELS", "off")  # kernels add in another order than torch's product
    form, grid = stored(RECIPES[0]), GRIDS[2]
    packed = PackedLinear(form.spec(), form.tensors(), None, torch.float32, grid.spec(), grid.tensors())
    expected = grid.rounded(X.half()) @ form.decode().half().T
    cast = torch.nn.Sequential(packed).half()
    assert torch.equal(cast(X.half()), expected)
    assert packed.get_buffer("input_scale").dtype == torch.float32
    assert set(packed.state_dict()) >= {"weight", "input_scale", "input_zero", "input_group"}
    assert "group 6 bits" in repr(packed)


def test_clipping_is_counted() -> None:
    grid = GroupGrid.between(torch.tensor([0.0]), torch.tensor([1.0]), torch.zeros(4), 8)
    assert grid.clipped(torch.tensor([[0.0, 1.0, 2.0, -1.0]])) == 0.5


SPEC = GRIDS[2].spec()
STORED = GRIDS[2].tensors()


@pytest.mark.parametrize(
    ("spec", "tensors", "message"),
    [
        ({"form": "nibble", "bits": 8}, {}, "no grid for inputs named 'nibble'"),
        ({"form": "token", "bits": 9}, {}, "2 to 8 bits"),
        ({"form": "token", "bits": True}, {}, "2 to 8 bits"),
        ({"form": "token", "bits": 8}, STORED, "needs the tensors"),
        (SPEC, {}, "needs the tensors"),
        ({**SPEC, "columns": 41}, STORED, "must be uint8"),
        ({**SPEC, "groups": 300}, STORED, "1 to 256 groups"),
        ({**SPEC, "columns": -1}, STORED, "need columns"),
        (SPEC, {**STORED, "_scale": torch.tensor([1.0, torch.nan, 1.0])}, "positive and finite"),
        (SPEC, {**STORED, "_scale": torch.tensor([1.0, 0.0, 1.0])}, "positive and finite"),
        (SPEC, {**STORED, "_zero": torch.tensor([1, 64, 1], dtype=torch.uint8)}, "outside"),
        (SPEC, {**STORED, "_group": torch.full((40,), 3, dtype=torch.uint8)}, "outside"),
    ],
)
def test_damage_is_refused(spec: dict[str, Any], tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        restore_inputs(spec, tensors)
