"""Who reads and writes the residual stream, found by trial, and what is refused because it has no other basis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.normalize.modules import SIZES, bloom, gpt2, made, neox, vit
from torch import nn

from layerwise.errors import InputError
from layerwise.network.basis_search import find_basis_stream
from layerwise.network.network import open_network

DECODER = {**SIZES, "vocab_size": 90, "intermediate_size": 96}


def gemma() -> nn.Module:
    """Its gains are stored as 1 + g."""
    from transformers import GemmaConfig, GemmaForCausalLM

    return made(GemmaForCausalLM, GemmaConfig, head_dim=12, num_key_value_heads=4, **DECODER)


def olmo2() -> nn.Module:
    """Norms at the end of its branches."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    return made(Olmo2ForCausalLM, Olmo2Config, **DECODER)


def bare_llama() -> nn.Module:
    """Its output is its last norm's."""
    from transformers import LlamaConfig, LlamaModel

    return made(LlamaModel, LlamaConfig, **DECODER)


def test_a_llama_is_described_whole(tiny_llama: Path) -> None:
    found = find_basis_stream(open_network(tiny_llama).module, "test")
    blocks = [f"model.layers.{i}" for i in range(2)]
    assert dict(found.writers) == {
        "model.embed_tokens.weight": 1,
        **{f"{b}.{w}.weight": 0 for b in blocks for w in ("self_attn.o_proj", "mlp.down_proj")},
    }
    first, second = found.norms[:2]
    assert first.path == f"{blocks[0]}.input_layernorm" and not first.centres and first.bias is None
    assert set(first.readers) == {f"{blocks[0]}.self_attn.{p}_proj.weight" for p in "qkv"}
    assert set(second.readers) == {f"{blocks[0]}.mlp.{p}_proj.weight" for p in ("gate", "up")}
    assert found.norms[-1].readers == {"lm_head.weight": 1}
    assert found.shared == {"model.embed_tokens.weight": "lm_head.weight"}
    assert [(h.size, h.values, h.rows) for h in found.heads] == [
        (16, f"{b}.self_attn.v_proj.weight", (0, 32, 1)) for b in blocks
    ]


def test_routers_and_every_expert_are_found(tiny_qwen3_moe: Path) -> None:
    found = find_basis_stream(open_network(tiny_qwen3_moe).module, "test")
    readers = {reader for norm in found.norms for reader in norm.readers}
    assert any(name.endswith("mlp.gate.weight") for name in readers)
    assert sum(".experts." in name for name in readers) == 2 * 6
    assert sum(".experts." in name for name in found.writers) == 6
    assert not any("q_norm" in norm.path or "k_norm" in norm.path for norm in found.norms)


@pytest.mark.parametrize(("network", "rows"), [(gpt2, (96, 144, 1)), (neox, (0, 144, 3))])
def test_values_are_found_in_a_matrix_that_holds_queries_and_keys(network: Any, rows: tuple[int, int, int]) -> None:
    found = find_basis_stream(network(), "test")
    assert [h.rows for h in found.heads] == [rows, rows]
    assert found.keeps_ones and all(norm.takes_bias == (norm is not found.norms[-1]) for norm in found.norms)


@pytest.mark.parametrize(
    ("network", "why"),
    [
        (bloom, "a norm"),
        (gemma, "reads the residual stream past a norm"),
        (olmo2, "is another function in another basis"),
        (bare_llama, "otherwise than by norm and matrix"),
        (vit, "otherwise than by norm and matrix"),
    ],
)
def test_what_has_no_other_basis_is_refused_by_name(network: Any, why: str) -> None:
    module = network()
    with pytest.raises(InputError, match=rf"test refuses {type(module).__name__}: .*({why})"):
        find_basis_stream(module, "test")
