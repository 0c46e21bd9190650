"""Packed modules under ``torch.compile``: one node each, the same values, gradients, and no hold on a module."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from tests.network.test_packed_kernels import encode, inputs, linear
from torch import nn

from layerwise.network import operators
from layerwise.network.packed import PackedEmbedding, PackedHead, PackedLinear

FORMS = ["rtn:bits=4,group=32", "nf4"]


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("recipe", FORMS)
def test_a_compiled_linear_is_one_node_with_the_same_values(recipe: str):
    packed, _ = linear(recipe)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]):
        graphs.append(graph)
        return graph

    compiled = torch.compile(packed, backend=backend, fullgraph=True)
    x = inputs(3, 96)
    with torch.no_grad():
        assert torch.equal(compiled(x), packed(x))
    (graph,) = graphs
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("packed_product" in name for name in names) == 1 and not any("matmul" in name for name in names)


def test_a_whole_network_is_traced_in_one_graph():
    form = encode("rtn:bits=4,group=32")
    table = PackedEmbedding(form.spec(), form.tensors(), torch.float32, scale=2.0)
    network = nn.Sequential(table, nn.LayerNorm(96), linear()[0], nn.Linear(40, 96), PackedHead(table, None))
    index = torch.tensor([[1, 5, 0], [7, 7, 39]])
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(index), network(index), atol=1e-5)
        assert compiled(index[:, :2]).shape == (2, 2, 40)  # another size, traced again or by the same graph


def test_gradients_pass_through_the_node():
    packed, form = linear()
    x = inputs(2, 96).requires_grad_()
    torch.compile(packed, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, form.decode().sum(0).expand(2, -1), atol=1e-4)


def test_a_graph_follows_the_stored_tensors():
    packed, _ = linear("rtn:bits=4,group=32,symmetric=true")
    compiled = torch.compile(packed, backend="eager", fullgraph=True)
    x = inputs(1, 96)
    with torch.no_grad():
        before = compiled(x)
        packed.weight_scale.mul_(2)
        assert torch.equal(compiled(x), 2 * before)


def test_the_operators_meet_torchs_own_checks():
    packed, _ = linear()
    torch.library.opcheck(operators.packed_product, (inputs(3, 96), packed._number, 40))
    form = encode("rtn:bits=4,group=32")
    table = PackedEmbedding(form.spec(), form.tensors(), torch.bfloat16)
    asked = (torch.tensor([[0, 3]]), table._number, 96, torch.empty(0, dtype=torch.bfloat16))
    torch.library.opcheck(operators.packed_rows, asked)


def test_every_module_has_a_number_of_its_own_and_is_let_go():
    packed, _ = linear()
    twins = [copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))]
    assert len({packed._number, *(twin._number for twin in twins)}) == 3
    for twin in twins:
        assert torch.equal(operators.packed_product(inputs(1, 96), twin._number, 40), packed.product(inputs(1, 96)))
    number = packed._number
    del packed
    gc.collect()
    with pytest.raises(RuntimeError, match="is gone"):
        operators.packed_product(inputs(1, 96), number, 40)


@pytest.mark.slow
def test_inductor_runs_it_where_there_is_a_compiler():
    import shutil

    if shutil.which("c++") is None:
        pytest.skip("inductor needs a C++ compiler")
    packed = linear()[0]
    assert isinstance(packed, PackedLinear)
    with torch.no_grad():
        found = torch.compile(nn.Sequential(packed, nn.ReLU()), fullgraph=True)(inputs(2, 96))
        assert torch.allclose(found, packed(inputs(2, 96)).relu(), atol=1e-5)
