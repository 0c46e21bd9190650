"""Architectures in the terms of llama.cpp: names of tensors, keys of the file, and rows that change their order.

llama.cpp turns neighbouring pairs of a head's channels by one angle, transformers channel ``i`` and ``i + d/2``. Where
its graph is the first (``llama``), the rows of q and k are written in the order 0, d/2, 1, d/2 + 1, … of each head.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerwise.errors import InputError
from layerwise.network.gguf_checkpoint import DECODER, paired_rows
from layerwise.network.gguf_file import Value

Config = dict[str, Any]

_GPT2 = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


@dataclass(frozen=True)
class Target:
    """One architecture. ``names``: module (within its block, or whole) -> llama.cpp's name of it."""

    name: str
    names: dict[str, str]
    keys: Callable[[Config, str], dict[str, Value]]
    pairs: bool = False  # neighbouring channels are turned together
    transposed: tuple[str, ...] = ()  # modules that keep [in, out]

    def place(self, parameter: str) -> str:
        """``model.layers.3.mlp.up_proj.weight`` -> ``blk.3.ffn_up.weight``; an unknown one is an ``InputError``."""
        module, _, last = parameter.rpartition(".")
        block = re.fullmatch(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.+)", module)
        found = self.names.get(block[2] if block else module)
        if found is None or last not in ("weight", "bias"):
            raise InputError(f"llama.cpp's {self.name} has no place for {parameter}")
        return f"blk.{block[1]}.{found}.{last}" if block else f"{found}.{last}"

    def row_order(self, parameter: str, rows: int, config: Config) -> NDArray[np.int64] | None:
        """New order of the rows of a matrix or vector, where it has one."""
        if not self.pairs or not re.search(r"\.(q_proj|k_proj)\.", parameter):
            return None
        return paired_rows(rows, _head_size(config))

    def is_transposed(self, parameter: str) -> bool:
        return parameter.endswith(tuple(f"{name}.weight" for name in self.transposed))


def _head_size(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _decoder_keys(config: Config, prefix: str) -> dict[str, Value]:
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"llama.cpp's {prefix} has silu in its feed-forward part, not {config['hidden_act']}")
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        raise InputError(f"llama.cpp's {prefix} reads the whole context; the network has a sliding window")
    heads = int(config["num_attention_heads"])
    return {
        f"{prefix}.context_length": int(config["max_position_embeddings"]),
        f"{prefix}.embedding_length": int(config["hidden_size"]),
        f"{prefix}.block_count": int(config["num_hidden_layers"]),
        f"{prefix}.feed_forward_length": int(config["intermediate_size"]),
        f"{prefix}.attention.head_count": heads,
        f"{prefix}.attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        f"{prefix}.attention.key_length": _head_size(config),
        f"{prefix}.attention.value_length": _head_size(config),
        f"{prefix}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{prefix}.vocab_size": int(config["vocab_size"]),
        f"{prefix}.rope.dimension_count": _head_size(config),
        **_rope(config, prefix),
    }


def _rope(config: Config, prefix: str) -> dict[str, Value]:
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = settings.get("rope_type", settings.get("type", "default"))
    base = float(settings.get("rope_theta") or config.get("rope_theta") or 10000.0)
    values: dict[str, Value] = {f"{prefix}.rope.freq_base": base}
    if kind == "linear":
        values |= {f"{prefix}.rope.scaling.type": "linear", f"{prefix}.rope.scaling.factor": float(settings["factor"])}
    elif kind != "default":
        raise InputError(f"the gguf export knows default and linear rotary angles, not {kind}")
    return values


def _gpt2_keys(config: Config, prefix: str) -> dict[str, Value]:
    if config.get("activation_function", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh"):
        raise InputError(f"llama.cpp's gpt2 has gelu_new in its feed-forward part, not {config['activation_function']}")
    if config.get("scale_attn_by_inverse_layer_idx") or not config.get("scale_attn_weights", True):
        raise InputError("llama.cpp's gpt2 scales attention by the square root of the head's width alone")
    width = int(config["n_embd"])
    return {
        f"{prefix}.context_length": int(config["n_positions"]),
        f"{prefix}.embedding_length": width,
        f"{prefix}.block_count": int(config["n_layer"]),
        f"{prefix}.feed_forward_length": int(config.get("n_inner") or 4 * width),
        f"{prefix}.attention.head_count": int(config["n_head"]),
        f"{prefix}.attention.layer_norm_epsilon": float(config["layer_norm_epsilon"]),
        f"{prefix}.vocab_size": int(config["vocab_size"]),
    }


TARGETS = {
    "LlamaForCausalLM": Target("llama", DECODER, _decoder_keys, pairs=True),
    "MistralForCausalLM": Target("llama", DECODER, _decoder_keys, pairs=True),
    "Qwen2ForCausalLM": Target("qwen2", DECODER, _decoder_keys),
    "GPT2LMHeadModel": Target("gpt2", _GPT2, _gpt2_keys, transposed=("c_attn", "c_proj", "c_fc")),
}


def target_of(architecture: str) -> Target:
    """llama.cpp's architecture for ours; raises ``InputError`` naming those that there are."""
    if architecture not in TARGETS:
        raise InputError(f"the gguf export knows {', '.join(TARGETS)}, not {architecture}")
    return TARGETS[architecture]
