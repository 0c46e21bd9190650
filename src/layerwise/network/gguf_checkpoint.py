"""A GGUF file of a LLaMA opened as a checkpoint: its tensors are decoded from their blocks as they are read.

Names, settings and the order of the rows of q and k are translated back; config and tokenizer are written into a folder
of the user's cache, because transformers reads them from one. The weights stay in the file. Types whose blocks a form
of ours holds bit for bit are read (Q4_0 to Q8_0, Q2_K to Q6_K, TQ1_0, TQ2_0, F16, BF16, F32); others are refused by
name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerwise.encoding.encoded import Encoded
from layerwise.encoding.ggml_forms import READ, form_of, values_of
from layerwise.errors import InputError
from layerwise.network.checkpoint import Checkpoint
from layerwise.network.companions import find_companions
from layerwise.network.gguf_file import GgufTensor, read_header
from layerwise.network.gguf_tokenizer import write_tokenizer
from layerwise.network.safetensors_file import Elsewhere, TensorInfo

LAYOUT = 1  # of the folder in the cache
LARGEST = 1 << 31  # of any setting
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
DECODER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class GgufInfo(Elsewhere):
    """A tensor of a GGUF file. ``head``: channels of a head whose neighbouring rows are pairs, else 0."""

    kind: str = ""
    head: int = 0

    def values(self, index: slice | Tensor) -> Tensor:
        packed = self.packed()[index.numpy() if isinstance(index, Tensor) else index]
        if self.kind in FLOATS:
            return torch.from_numpy(packed.copy()).view(self.dtype).view(-1, *self.shape[1:])
        return values_of(self.kind, packed, self.shape[1])

    def packed(self) -> NDArray[np.uint8]:
        """All rows as they are stored, in our order: uint8 [rows, row bytes]."""
        content = np.fromfile(self.file, np.uint8, self.nbytes, offset=self.start)
        if len(content) != self.nbytes:
            raise InputError(f"{self.file} is truncated: tensor {self.name!r} ends before its last byte")
        rows = content.reshape(self.shape[0], -1)
        return rows[np.argsort(paired_rows(len(rows), self.head))] if self.head else rows

    def encoded(self) -> Encoded | None:
        """The matrix in a stored form that decodes to the same numbers; None where it is stored as floats."""
        return form_of(self.kind, self.packed(), self.shape[1]) if self.kind in READ else None


def paired_rows(rows: int, head: int) -> NDArray[np.int64]:
    """Rows of heads of ``head`` channels, channel i followed by channel i + head / 2."""
    return np.arange(rows).reshape(-1, 2, head // 2).swapaxes(1, 2).reshape(-1)


def open_gguf(path: Path) -> Checkpoint:
    """Open a file, reading its header only. Raises ``InputError`` for anything but a whole LLaMA that we can read."""
    values, stored = read_header(path)
    architecture = values.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"{path} holds a network of llama.cpp's architecture {architecture!r}; layerwise reads llama")
    config = _config(values, stored, path)
    tensors: dict[str, TensorInfo] = {}
    for tensor in stored.values():
        info = _info(path, tensor, config["head_dim"])
        tensors[info.name] = info
    digest = hashlib.sha256(json.dumps([LAYOUT, config, values], default=str).encode()).hexdigest()[:12]
    folder = _cache() / f"{path.stem}-{digest}"
    if not folder.is_dir():
        _write_companions(folder, config, values, path)
    return Checkpoint(folder, config, config["architectures"][0], (path,), tensors, find_companions(folder))


def _write_companions(folder: Path, config: dict[str, Any], values: dict[str, Any], path: Path) -> None:
    """Config and tokenizer, as a whole folder or not at all, whoever else writes the same one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as scratch:
        partial = Path(scratch) / "whole"
        partial.mkdir()
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_tokenizer(values, partial, path)
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.is_dir():  # another process was first
                raise


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerwise" / "gguf"


def _config(values: dict[str, Any], stored: dict[str, GgufTensor], path: Path) -> dict[str, Any]:
    def number(key: str, kind: type = int, default: Any = None) -> Any:
        found: Any = values.get(f"llama.{key}", default)
        if not isinstance(found, (int, float)) or type(found) is not kind or not 0 < found < LARGEST:
            raise InputError(f"{path} needs a positive {kind.__name__} llama.{key}, not {found!r}")
        return found

    if values.get("llama.expert_count") or "rope_freqs.weight" in stored:
        raise InputError(f"{path} is a LLaMA with experts or scaled rotary angles, which layerwise does not read")
    if values.get("llama.rope.scaling.type", "none") not in ("none", ""):
        raise InputError(f"{path} scales its rotary angles, which layerwise does not read")
    table = stored.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise InputError(f"{path} has no table token_embd.weight")
    heads, width = number("attention.head_count"), number("embedding_length")
    size = number("attention.key_length", default=max(1, width // heads))
    if size % 2 or number("attention.value_length", default=size) != size:
        raise InputError(f"{path} has heads of {size} channels, which are no pairs or differ between keys and values")
    if number("rope.dimension_count", default=size) != size:
        raise InputError(f"{path} turns a part of its heads' channels, which layerwise does not read")
    if number("block_count") > len(stored) or size > 1 << 16:
        raise InputError(f"{path} claims {values['llama.block_count']} blocks with heads of {size} channels")
    biased = any(name.endswith("attn_q.bias") for name in stored)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", default=heads),
        "head_dim": size,
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon", float),
        "rope_parameters": {"rope_type": "default", "rope_theta": number("rope.freq_base", float, 10000.0)},
        "vocab_size": table.shape[0],
        "tie_word_embeddings": "output.weight" not in stored,
        "attention_bias": biased,
        "mlp_bias": any(name.endswith("ffn_up.bias") for name in stored),
        "bos_token_id": values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": values.get("tokenizer.ggml.eos_token_id"),
        "dtype": "float32",
    }


def _info(path: Path, tensor: GgufTensor, head: int) -> GgufInfo:
    kind = tensor.kind.name
    if kind in READ and len(tensor.shape) != 2:
        raise InputError(f"{path}: tensor {tensor.name} is no matrix, but of type {kind}")
    paired = re.search(r"\.attn_[qk]\.", tensor.name) is not None
    if paired and tensor.shape[0] % head:
        raise InputError(
            f"{path}: tensor {tensor.name} has {tensor.shape[0]} rows, which heads of {head} do not divide"
        )
    dtype = FLOATS.get(kind, torch.float32)
    name = _parameter(tensor.name, path)
    return GgufInfo(name, path, dtype, tensor.shape, tensor.start, tensor.nbytes, kind, head if paired else 0)


def _parameter(name: str, path: Path) -> str:
    """``blk.3.ffn_up.weight`` -> ``model.layers.3.mlp.up_proj.weight``."""
    block = re.fullmatch(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)", name)
    outer = re.fullmatch(r"(\w+)\.(weight|bias)", name)
    wanted = block[2] if block else outer[1] if outer else ""
    inside = {ours for ours in DECODER if ours.startswith(("self_attn", "mlp")) or ours.endswith("layernorm")}
    found = next(
        (ours for ours, theirs in DECODER.items() if theirs == wanted and (ours in inside) == bool(block)), None
    )
    if found is None:
        raise InputError(f"{path}: a LLaMA has no place for tensor {name}")
    if block:
        return f"model.layers.{block[1]}.{found}.{block[3]}"
    assert outer is not None
    return f"{found}.{outer[2]}"
