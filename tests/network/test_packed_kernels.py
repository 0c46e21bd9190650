"""Packed modules multiply by a compiled kernel where there is one, and by the reference everywhere else."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.encoding.encoded import Encoded
from layerwise.errors import InputError
from layerwise.kernels import library
from layerwise.network.packed import PackedEmbedding, PackedHead, PackedLinear, set_activations
from layerwise.recipe import parse_recipe

compiled = pytest.mark.skipif(not library.paths(), reason=f"no compiled kernels here: {library.why_absent()}")


def encode(recipe: str, rows: int = 40, columns: int = 96) -> Encoded:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    return parse_recipe(recipe).encoder.encode(weight, SiteStatistics.uninformed(rows, columns))


def linear(recipe: str = "rtn:bits=4,group=32") -> tuple[PackedLinear, Encoded]:
    form = encode(recipe)
    return PackedLinear(form.spec(), form.tensors(), None, torch.float32), form


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


RECIPES = ["rtn:bits=2,group=32", "rtn:bits=3,group=0", "rtn:bits=8,group=64", "nf4", "ternary", "ptqtp"]


@compiled
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tokens", [1, 5, 140])
def test_the_product_is_the_references(recipe: str, tokens: int):
    packed, form = linear(recipe)
    x = inputs(tokens, 96)
    expected = x.double() @ form.decode().double().T
    assert packed.kernel() is not None
    assert float((packed(x) - expected).norm() / expected.norm()) < 1e-5
    assert packed(x.bfloat16()).dtype == torch.bfloat16
    assert float((packed(x.bfloat16()) - expected).norm() / expected.norm()) < 1e-2


@compiled
def test_int8_activations_are_an_option():
    packed, _ = linear()
    x = inputs(3, 4, 96)
    exact = packed(x)
    assert set_activations(nn.Sequential(packed, nn.ReLU()), "int8") == 1
    rounded = packed(x)
    assert not torch.equal(rounded, exact)
    assert float((rounded - exact).norm() / exact.norm()) < 1e-2
    set_activations(packed, "exact")
    assert torch.equal(packed(x), exact)
    with pytest.raises(InputError, match="exact or int8"):
        set_activations(packed, "int4")


@compiled
def test_a_codebook_stays_exact():
    packed, _ = linear("nf4")
    exact = packed(inputs(2, 96))
    set_activations(packed, "int8")
    assert torch.equal(packed(inputs(2, 96)), exact)


@compiled
def test_changed_tensors_are_seen():
    packed, _ = linear("rtn:bits=4,group=32,symmetric=true")
    x = inputs(1, 96)
    before = packed(x)
    packed.weight_scale.mul_(2)  # in place: exactly twice
    assert torch.equal(packed(x), 2 * before)
    twin = copy.deepcopy(packed)
    twin.weight_scale.mul_(2)
    assert torch.equal(twin(x), 4 * before) and torch.equal(packed(x), 2 * before)
    packed.load_state_dict(twin.state_dict())
    assert torch.equal(packed(x), 4 * before)


@compiled
def test_in_inference_mode():
    packed, form = linear()
    with torch.inference_mode():
        assert torch.allclose(packed(inputs(2, 96)), inputs(2, 96) @ form.decode().T, atol=1e-4)


@compiled
def test_gradients_and_transforms_take_the_reference():
    packed, form = linear()
    x = inputs(2, 96).requires_grad_()
    packed(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, form.decode().sum(0).expand(2, -1), atol=1e-4)
    batched = torch.vmap(packed)(inputs(3, 96))
    assert torch.allclose(batched, inputs(3, 96) @ form.decode().T, atol=1e-4)
    packed.double()
    assert packed(inputs(2, 96).double()).dtype == torch.float64


@compiled
def test_a_tied_head_multiplies_by_its_tables_kernel():
    form = encode("rtn:bits=3,group=16")
    table = PackedEmbedding(form.spec(), form.tensors(), torch.float32)
    head = PackedHead(table, None)
    x = inputs(1, 96)
    assert torch.allclose(head(x), x @ form.decode().T, atol=1e-4)
    assert table._repacked is not None and table._repacked[2] is not None


def test_without_a_library_the_reference_multiplies_with_one_warning(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library, "paths", lambda: ())
    monkeypatch.setattr(library, "why_absent", lambda: "it was taken away for a test")
    monkeypatch.delenv(library.VARIABLE, raising=False)
    library._chosen.cache_clear()
    packed, form = linear()
    x = inputs(2, 96)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        first, second = packed(x), packed(x)
        other = linear("nf4")[0](x)
    library._chosen.cache_clear()
    assert len(said) == 1 and "taken away for a test" in str(said[0].message)
    assert torch.equal(first, form.multiply(x)) and torch.equal(second, first) and other.shape == (2, 40)


def test_the_variable_turns_kernels_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(library.VARIABLE, "off")
    packed, form = linear()
    assert torch.equal(packed(inputs(2, 96)), form.multiply(inputs(2, 96))) and packed.kernel() is None
    monkeypatch.setenv(library.VARIABLE, "avx513")
    with pytest.raises(InputError, match="is one of avx512, avx2, neon-dot, neon, portable, off"):
        linear()[0](inputs(2, 96))
