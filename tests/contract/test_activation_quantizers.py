"""The laws of every technique that quantizes inputs, run over the registry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerwise.calibrate.input_ranges import InputRanges
from layerwise.encoding.inputs import InputGrid, Quantized, input_layout, restore_inputs
from layerwise.errors import InputError
from layerwise.recipe import parse_activations
from layerwise.roles import ActivationQuantizer
from layerwise.technique import find, names

COLUMNS = 24
NAMES = names(ActivationQuantizer)


def some(tokens: int = 40, seed: int = 0) -> Tensor:
    x = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(seed))
    x[:, 5] *= 30
    x[:, 6] = x[:, 6].abs()
    return x


INPUTS = {
    "some": some(),
    "zero": torch.zeros(6, COLUMNS),
    "constant": torch.full((6, COLUMNS), -0.7),
    "huge": some(6) * 1e36,
    "tiny": some(6) * 1e-42,
    "one token": some(1),
}


@pytest.fixture(params=NAMES)
def quantizer(request: pytest.FixtureRequest) -> ActivationQuantizer:
    made = find(request.param)()
    assert isinstance(made, ActivationQuantizer)
    return made


def grid_of(quantizer: ActivationQuantizer, x: Tensor) -> InputGrid:
    return quantizer.grid(InputRanges.of(x) if quantizer.static else None)


def again(grid: InputGrid, x: Tensor, first: Quantized) -> Quantized:
    """``x`` on the grid with the scales it got at first."""
    on = getattr(grid, "on", None)
    return on(x, first.scale) if on is not None else grid.quantize(x)


def test_there_are_quantizers() -> None:
    assert {"token_int", "dgq"} <= set(NAMES)


@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_values_are_finite_and_codes_are_whole_and_fit(quantizer: ActivationQuantizer, x: Tensor) -> None:
    found = grid_of(quantizer, x).quantize(x)
    assert bool(found.values().isfinite().all()) and found.values().shape == x.shape
    assert torch.equal(found.codes, found.codes.round())
    bits = quantizer.bits  # type: ignore[attr-defined]
    assert float(found.codes.max() - found.codes.min()) <= 2**bits - 1


@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_what_is_on_the_grid_stays(quantizer: ActivationQuantizer, x: Tensor) -> None:
    grid = grid_of(quantizer, x)
    first = grid.quantize(x)
    second = again(grid, first.values(), first)
    assert torch.equal(second.codes, first.codes) and torch.equal(second.values(), first.values())


def test_eight_bits_are_close(quantizer: ActivationQuantizer) -> None:
    x = some()
    error = (grid_of(quantizer, x).rounded(x) - x).norm() / x.norm()
    assert float(error) < 0.03


def test_tokens_do_not_see_one_another(quantizer: ActivationQuantizer) -> None:
    x = some()
    grid = grid_of(quantizer, x)
    alone = torch.cat([grid.rounded(row[None]) for row in x])
    assert torch.equal(grid.rounded(x), alone)
    assert torch.equal(grid.rounded(x.view(4, 10, COLUMNS)).view_as(x), alone)


def test_the_same_twice(quantizer: ActivationQuantizer) -> None:
    x = some()
    first, second = grid_of(quantizer, x), grid_of(quantizer, x.clone())
    assert first.spec() == second.spec()
    assert all(torch.equal(t, second.tensors()[n]) for n, t in first.tensors().items())
    assert torch.equal(first.rounded(x), second.rounded(x))


def test_the_type_of_the_inputs_stays(quantizer: ActivationQuantizer) -> None:
    x = some().half()
    assert grid_of(quantizer, x.float()).rounded(x).dtype == torch.float16


def test_it_is_restored_from_what_it_stores(quantizer: ActivationQuantizer) -> None:
    x = some()
    grid = grid_of(quantizer, x)
    stored = {suffix: (t.dtype, tuple(t.shape)) for suffix, t in grid.tensors().items()}
    assert stored == quantizer.layout(COLUMNS) == input_layout(grid.spec())
    assert torch.equal(restore_inputs(grid.spec(), grid.tensors()).rounded(x), grid.rounded(x))


def test_its_text_is_read_back(quantizer: ActivationQuantizer) -> None:
    assert parse_activations(str(quantizer)) == quantizer


def test_other_techniques_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="rtn' quantizes no activations"):
        parse_activations("rtn:bits=4")
    with pytest.raises(InputError, match=r"does not exist.*token_int"):
        parse_activations("int7")
    with pytest.raises(InputError, match="from 2 to 8"):
        parse_activations("token_int:bits=9")
