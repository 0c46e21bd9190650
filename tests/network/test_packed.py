from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.encoding.encoded import Encoded
from layerwise.errors import InputError
from layerwise.network.packed import Packed, PackedEmbedding, PackedHead, PackedLinear
from layerwise.recipe import parse_recipe


def encode(rows: int, columns: int, recipe: str = "rtn:bits=3,group=16") -> Encoded:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    return parse_recipe(recipe).encoder.encode(weight, SiteStatistics.uninformed(rows, columns))


def linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[PackedLinear, Encoded]:
    form = encode(10, 22)
    given = nn.Parameter(torch.linspace(-1, 1, 10, dtype=dtype)) if bias else None
    return PackedLinear(form.spec(), form.tensors(), given, dtype), form


def table(padding: int | None = None, scale: float | None = None) -> tuple[PackedEmbedding, Encoded]:
    form = encode(12, 20)
    return PackedEmbedding(form.spec(), form.tensors(), torch.float32, padding, scale), form


INPUT = torch.randn(2, 3, 22, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_dense_product(bias: bool):
    packed, form = linear(bias)
    expected = nn.functional.linear(INPUT, form.decode(), packed.bias)
    assert torch.allclose(packed(INPUT), expected, atol=1e-6)
    assert (packed.out_features, packed.in_features) == (10, 22)


def test_state_is_what_is_stored():
    packed, form = linear()
    state = packed.state_dict()
    assert set(state) == {"bias", *("weight" + suffix for suffix in form.tensors())}
    assert state["weight"].dtype == torch.uint8 and state["weight"].dim() == 1
    assert all(torch.equal(state["weight" + suffix], tensor) for suffix, tensor in form.tensors().items())


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casting_never_touches_what_is_packed(cast: str):
    packed, form = linear()
    network = getattr(nn.Sequential(packed), cast)()
    for suffix, tensor in form.tensors().items():
        kept = packed.get_buffer("weight" + suffix)
        assert kept.dtype == tensor.dtype and torch.equal(kept, tensor)
    assert packed.bias is not None and packed.bias.dtype == packed.dtype == getattr(
        torch, cast.replace("half", "float16")
    )
    assert network(INPUT.to(packed.dtype)).dtype == packed.dtype
    assert torch.equal(packed.encoded.decode(), form.decode())


def test_to_another_device_moves_everything():
    packed, _ = linear()
    packed.to("meta", torch.float16)
    assert {b.device.type for b in packed.buffers()} == {"meta"}
    assert packed.weight_scale.dtype == torch.float16 and packed.weight.dtype == torch.uint8


def test_replaced_buffers_are_seen():
    packed, form = linear()
    packed(INPUT)
    packed.weight = torch.zeros_like(packed.weight)
    assert not torch.equal(packed.encoded.decode(), form.decode())
    packed.load_state_dict({"bias": packed.bias, **{"weight" + s: t for s, t in form.tensors().items()}})
    assert torch.equal(packed.encoded.decode(), form.decode())


def test_wrong_buffers_are_refused():
    packed, _ = linear()
    packed.weight = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(InputError):
        packed(INPUT)


def test_gradients_flow_to_the_input():
    packed, form = linear()
    x = INPUT.clone().requires_grad_()
    packed(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, form.decode().sum(0).expand_as(x), atol=1e-5)


@pytest.mark.parametrize("scale", [None, 2.5])
def test_embedding_looks_up_rows(scale: float | None):
    packed, form = table(padding=1, scale=scale)
    index = torch.tensor([[0, 1, 11], [5, 5, 0]])
    dense = nn.Embedding.from_pretrained(form.decode(), padding_idx=1)
    assert torch.equal(packed(index), dense(index) * (scale or 1))
    assert packed.padding_idx == 1 and packed.num_embeddings == 12 and packed.embedding_dim == 20
    assert packed(torch.zeros(0, dtype=torch.int64)).shape == (0, 20)
    assert packed.half()(index).dtype == torch.float16


def test_tied_head_stores_nothing():
    packed, form = table()
    network = nn.ModuleDict({"table": packed, "head": PackedHead(packed, None)})
    assert all(name.startswith("table.") for name in network.state_dict())
    x = torch.randn(4, 20, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(network["head"](x), x @ form.decode().T, atol=1e-5)
    assert network["head"].weight is packed.weight and network["head"].bias is None


def test_tied_head_with_a_bias_of_its_own_or_borrowed():
    packed, form = table()
    bias = nn.Parameter(torch.arange(12.0))
    own = PackedHead(packed, bias)
    owner = nn.Module()
    owner.register_parameter("bias", bias)
    borrowed = PackedHead(packed, None, owner)
    assert set(own.state_dict()) == {"bias"} and not borrowed.state_dict()
    x = torch.randn(4, 20, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(own(x), x @ form.decode().T + bias, atol=1e-5)
    assert torch.equal(own(x), borrowed(x))


def test_copies_are_independent_and_stay_tied():
    packed, form = table()
    network = nn.ModuleDict({"table": packed, "head": PackedHead(packed, None)})
    stream = io.BytesIO()
    torch.save(network, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(network), torch.load(stream, weights_only=False)):
        assert twin["head"].table is twin["table"] is not packed
        twin["table"].weight.zero_()
        assert torch.equal(packed.encoded.decode(), form.decode())
        assert not torch.equal(twin["table"].encoded.decode(), form.decode())


def test_it_prints_its_form():
    assert "10x22, form=integer, bits=3" in repr(linear()[0]) and "tied" in repr(PackedHead(table()[0], None))
    assert issubclass(PackedLinear, Packed)
