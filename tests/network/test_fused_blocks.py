"""Blocks by the library inside transformers networks: found by structure, left to torch where they do not fit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.errors import InputError
from layerwise.kernels.encoder import PackedBlock
from layerwise.kernels.library import chosen_path, paths, why_absent
from layerwise.network import fused_blocks
from layerwise.network.fused_blocks import release_fused_blocks, use_fused_blocks
from layerwise.network.packed import PackedLinear, set_activations
from layerwise.network.short_attention import use_short_attention
from layerwise.recipe import parse_recipe

pytestmark = pytest.mark.skipif(
    not paths() or chosen_path() is None, reason=f"no compiled kernels here: {why_absent()}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96,
}  # fmt: skip
IDS = torch.arange(14).view(2, 7) + 3
PADDED = torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 0, 0]])


def pack(network: nn.Module, recipe: str = "rtn:bits=8,group=32", activations: str = "int8") -> Any:
    encoder = parse_recipe(recipe).encoder
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear):
            form = encoder.encode(module.weight.detach(), SiteStatistics.uninformed(*module.weight.shape))
            parent, _, own = name.rpartition(".")
            packed = PackedLinear(form.spec(), form.tensors(), module.bias, torch.float32)
            setattr(network.get_submodule(parent), own, packed)
    set_activations(network, activations)
    return network.eval()


def bert(**others: Any) -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    network = BertModel(BertConfig(**{**SIZES, "vocab_size": 50, **others}))
    for parameter in network.parameters():  # biases and norms that matter
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return network


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for every block that the library computed: whether from int8 activations."""
    found: list[bool] = []
    run = PackedBlock.run

    def counted(self: PackedBlock, x: Tensor, mask: Tensor | None = None, *, int8: bool, **others: Any) -> Tensor:
        found.append(int8)
        return run(self, x, mask, int8=int8, **others)

    monkeypatch.setattr(PackedBlock, "run", counted)
    return found


def states(network: Any, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return network(IDS, attention_mask=mask).last_hidden_state


def near(a: Tensor, b: Tensor) -> bool:
    """Equal but for inputs of products that lie a hair beside half a step of int8."""
    return float((a - b).norm() / b.norm()) < 2e-3


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "vit"])
def test_networks_of_either_order_give_what_they_gave(family: str, ran: list[bool]):
    from transformers import DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel, ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 2, "hidden_dim": 96, "vocab_size": 50}
    network = {
        "bert": bert,
        "roberta": lambda: RobertaModel(RobertaConfig(**SIZES, vocab_size=50)),
        "distilbert": lambda: DistilBertModel(DistilBertConfig(**sizes)),
        "vit": lambda: ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=8)),
    }[family]()
    plain = pack(network)
    fused = copy.deepcopy(plain)
    found = use_fused_blocks(fused)
    assert len(found.fused) == 2 and not found.left
    assert list(fused.state_dict()) == list(plain.state_dict())
    ran.clear()
    if family == "vit":
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert near(fused(images).last_hidden_state, plain(images).last_hidden_state)
        assert ran == [True, True]
        return
    for mask in (None, PADDED):
        found, expected = states(fused, mask), states(plain, mask)
        assert near(found[0], expected[0]) and near(found[1, :4], expected[1, :4])
    assert ran == [True] * 4
    short = [int(n) for n in PADDED.sum(1)]
    with torch.no_grad():
        alone = [fused(IDS[i : i + 1, :n]).last_hidden_state[0] for i, n in enumerate(short)]
    assert all(torch.allclose(states(fused, PADDED)[i, :n], alone[i], atol=1e-5) for i, n in enumerate(short))


@pytest.mark.skipif(chosen_path() != fused_blocks.DOT_PATH, reason="exact activations go to torch here")
def test_exact_activations_differ_by_rounding_only(ran: list[bool]):
    plain = pack(bert(), activations="exact")
    fused = copy.deepcopy(plain)
    use_fused_blocks(fused)
    ran.clear()
    assert torch.allclose(states(fused, PADDED)[0], states(plain, PADDED)[0], atol=1e-5) and ran == [False, False]


def test_what_does_not_fit_is_left_and_named():
    left = {
        "heads are not of 32": bert(num_attention_heads=4),
        "exact GELU": bert(hidden_act="gelu_new"),
        "gives other values": bert(is_decoder=True),  # causal
    }
    for said, network in left.items():
        found = use_fused_blocks(pack(network))
        assert not found.fused and all(said in why for why in found.left.values()) and len(found.left) == 2
    network = pack(bert(), "nf4")
    assert "no product with int8" in use_fused_blocks(network).left["encoder.layer.0"]
    network = pack(bert())
    network.encoder.layer[1].output.dense = nn.Linear(96, 64)
    found = use_fused_blocks(network)
    assert found.fused == ("encoder.layer.0",) and "output.dense is not packed" in found.left["encoder.layer.1"]
    network = pack(bert())
    network.encoder.layer[0].scale = nn.Parameter(torch.ones(1))
    assert "parameters of its own" in use_fused_blocks(network).left["encoder.layer.0"]
    with pytest.raises(InputError, match="no list of blocks"):
        use_fused_blocks(bert())


def test_queries_and_keys_are_told_apart_by_trial():
    """The same network with its three first linears under one another's names and in another order."""
    network = pack(bert())
    own = network.encoder.layer[0].attention.self

    class Turned(type(own)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Any:
            shape = (*hidden_states.shape[:-1], -1, 32)
            key, value, query = (
                p(hidden_states).view(shape).transpose(1, 2) for p in (self.query, self.key, self.value)
            )
            out = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask)
            return out.transpose(1, 2).reshape(hidden_states.shape), None

    own.__class__ = Turned
    plain = copy.deepcopy(network)
    assert use_fused_blocks(network).fused[0] == "encoder.layer.0"
    found = network.encoder.layer[0]._fused.structure.linears
    assert [name.rpartition(".")[2] for name in found[:3]] == ["value", "query", "key"]
    assert near(states(network), states(plain))


def test_torch_computes_what_the_library_is_not_for(ran: list[bool]):
    network = pack(bert())
    use_fused_blocks(network)
    ran.clear()
    network(IDS).last_hidden_state.sum().backward()
    assert network.encoder.layer[0].output.LayerNorm.weight.grad is not None and not ran
    network.train()
    states(network)
    network.eval()
    network.set_attn_implementation("eager")
    states(network, PADDED)  # a mask that is added
    assert not ran
    use_short_attention(network)
    states(network, PADDED)
    assert ran == [True, True]
    ran.clear()
    with torch.no_grad():
        wide = copy.deepcopy(network).bfloat16()
        assert wide(IDS).last_hidden_state.dtype == torch.bfloat16
        network.set_attn_implementation("eager")
        assert len(network(IDS, output_attentions=True).attentions) == 2 and not ran
    seen: list[int] = []
    network = pack(bert())
    use_fused_blocks(network)
    network.encoder.layer[0].output.dense.register_forward_pre_hook(lambda *_: seen.append(1))
    ran.clear()
    states(network)
    assert seen and ran == [True]


def test_it_follows_what_the_block_holds(ran: list[bool]):
    network = pack(bert())
    plain = copy.deepcopy(network)
    use_fused_blocks(network)
    states(network)
    for own in (network, plain):
        block = own.encoder.layer[0]
        block.output.LayerNorm.weight = nn.Parameter(torch.full((64,), 0.5))
        block.output.dense.weight_scale.mul_(2)
        block.intermediate.dense.bias.data = torch.ones(96)
    assert near(states(network), states(plain))
    ran.clear()
    for own in (network, plain):
        own.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()
    assert near(states(network), states(plain)) and ran == [True]
    set_activations(network, "exact")
    set_activations(network.encoder.layer[1].intermediate, "int8")  # no longer alike
    ran.clear()
    states(network)
    assert not ran


def test_copies_pickles_and_release(ran: list[bool]):
    network = pack(bert())
    use_fused_blocks(network)
    expected = states(network)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        ran.clear()
        assert torch.equal(states(twin), expected) and ran == [True, True]
        assert twin.encoder.layer[0]._number != network.encoder.layer[0]._number
    base = type(bert().encoder.layer[0])  # type: ignore[union-attr, index]
    assert isinstance(network.encoder.layer[0], base)
    use_fused_blocks(network)  # again: nothing is laid over twice
    release_fused_blocks(network)
    ran.clear()
    assert all(type(block) is base for block in network.encoder.layer)
    assert near(states(network), expected) and not ran


def test_a_traced_block_is_one_node():
    network = pack(bert())
    use_fused_blocks(network)
    block = network.encoder.layer[0]
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    torch.library.opcheck(fused_blocks.encoder_block, (x, mask, block._number))
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    try:
        with torch.no_grad():
            found = torch.compile(block, backend=backend, fullgraph=True)(x, mask)
            assert torch.equal(found, block(x, mask))
    finally:
        torch._dynamo.reset()
    (graph,) = graphs
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert len(names) == 1 and "encoder_block" in names[0]
