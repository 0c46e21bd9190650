"""The site tree is found by looking: what is a table, a block, a linear, a head; what is tied, what lies transposed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from layerwise.errors import InputError
from layerwise.network.network import Network, hidden_width, open_network, output_width
from layerwise.network.sites import find_blocks, find_sites

LLAMA_LINEARS = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]
BERT_LINEARS = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]
GPT2_LINEARS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


def names(network: Network, **wanted: Any) -> list[str]:
    return [s.name for s in network.tree.sites if all(getattr(s, k) == v for k, v in wanted.items())]


def below(block: str, linears: list[str]) -> list[str]:
    return [f"{block}.{linear}" for linear in linears]


def test_llama(tiny_llama: Path) -> None:
    network = open_network(tiny_llama)
    assert network.tree.blocks == ("model.layers.0", "model.layers.1")
    for block in network.tree.blocks:
        assert [s.name for s in network.tree.of_block(block)] == below(block, LLAMA_LINEARS)
    assert names(network, kind="table") == ["model.embed_tokens"]
    assert network.tree.find("model.embed_tokens").head == "lm_head"  # tied: one site for both
    assert not names(network, kind="head") and not names(network, kind="position")
    key = network.tree.find("model.layers.0.self_attn.k_proj")
    assert (key.rows, key.columns, key.transposed, key.searched) == (32, 64, False, True)
    assert network.tree.find("model.layers.1.mlp.down_proj").columns == 172


def test_qwen2_has_a_head_of_its_own(tiny_qwen2: Path) -> None:
    network = open_network(tiny_qwen2)
    assert names(network, kind="head") == ["lm_head"]
    assert network.tree.find("model.embed_tokens").head is None
    assert network.tree.sites[0].kind == "table" and network.tree.sites[-1].kind == "head"  # execution order
    head = network.tree.find("lm_head")
    assert (head.rows, head.columns) == (output_width(network), hidden_width(network))


def test_gpt2_keeps_its_matrices_transposed(tiny_gpt2: Path) -> None:
    network = open_network(tiny_gpt2)
    assert network.tree.blocks == ("transformer.h.0", "transformer.h.1")
    assert names(network, transposed=True) == [n for b in network.tree.blocks for n in below(b, GPT2_LINEARS)]
    attention = network.tree.find("transformer.h.0.attn.c_attn")
    assert (attention.rows, attention.columns) == (144, 48)  # [out, in], whatever the module keeps
    assert network.read_site(attention).shape == (144, 48)
    assert torch.equal(network.read_site(attention), network.read(attention.parameter).T)
    assert network.tree.find("transformer.wte").head == "lm_head"
    assert names(network, kind="position") == ["transformer.wpe"]
    assert not network.tree.find("transformer.wpe").searched


def test_bert(tiny_bert: Path) -> None:
    network = open_network(tiny_bert)
    assert network.tree.blocks == ("encoder.layer.0", "encoder.layer.1")
    for block in network.tree.blocks:
        assert [s.name for s in network.tree.of_block(block)] == below(block, BERT_LINEARS)
    assert names(network, kind="table") == ["embeddings.word_embeddings"]
    assert names(network, kind="position") == ["embeddings.position_embeddings", "embeddings.token_type_embeddings"]
    assert names(network, kind="linear", block=None) == ["pooler.dense"]


def test_a_classifier_is_a_linear_after_the_blocks(tiny_bert_classifier: Path) -> None:
    network = open_network(tiny_bert_classifier)
    assert names(network, kind="linear", block=None) == ["bert.pooler.dense", "classifier"]
    assert not names(network, kind="head")


def test_the_tree_covers_every_matrix_once(tiny_network: Path) -> None:
    import transformers

    network = open_network(tiny_network)
    dense = getattr(transformers, network.architecture).from_pretrained(tiny_network)
    assert network.tree.parameters == sum(p.numel() for p in dense.parameters())
    covered = [s.name for s in network.tree.sites]
    assert len(set(covered)) == len(covered)
    plain = network.plain_parameters(covered)
    assert all(dense.get_parameter(name).dim() == 1 for name in plain)
    assert (
        sum(s.parameters for s in network.tree.sites) + sum(dense.get_parameter(name).numel() for name in plain)
        == network.tree.parameters
    )
    for site in network.tree.sites:
        stored = dense.get_parameter(site.parameter)
        assert torch.equal(network.read(site.parameter), stored)
        assert (site.rows, site.columns) == (tuple(reversed(stored.shape)) if site.transposed else tuple(stored.shape))


def test_reading_rows_and_parts(tiny_qwen2: Path) -> None:
    network = open_network(tiny_qwen2)
    rows = torch.tensor([5, 0, 5, 17])
    table = "model.embed_tokens.weight"
    assert torch.equal(network.read_rows(table, rows), network.read(table)[rows])
    part = network.read_part("model.layers.1")
    assert "self_attn.q_proj.bias" in part and "input_layernorm.weight" in part
    assert torch.equal(part["mlp.up_proj.weight"], network.read("model.layers.1.mlp.up_proj.weight"))


# ---------------------------------------------------------------- modules of other shapes


class Stack(nn.Module):
    def __init__(self, **lists: nn.ModuleList) -> None:
        super().__init__()
        for name, members in lists.items():
            self.add_module(name, members)


def linears(count: int, width: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(count))


def test_the_list_that_holds_the_most_is_the_blocks() -> None:
    assert find_blocks(Stack(small=linears(2, 2), large=linears(3, 16))) == ("large.0", "large.1", "large.2")


def test_a_list_inside_a_block_is_no_stack() -> None:
    inner = nn.ModuleList(Stack(experts=linears(4, 8)) for _ in range(2))
    assert find_blocks(Stack(layers=inner)) == ("layers.0", "layers.1")


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ({}, "has no list of equal blocks"),
        ({"mixed": nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])}, "has no list of equal blocks"),
        ({"empty": nn.ModuleList()}, "has no list of equal blocks"),
        ({"encoder": linears(3, 8), "decoder": linears(3, 8)}, "two stacks of blocks"),
    ],
)
def test_other_networks_are_refused(lists: dict[str, nn.ModuleList], said: str) -> None:
    with pytest.raises(InputError, match=said):
        find_blocks(Stack(**lists))


def test_an_unknown_site_is_a_key_error(tiny_bert: Path) -> None:
    with pytest.raises(KeyError):
        find_sites(open_network(tiny_bert).module).find("encoder.layer.9.output.dense")
