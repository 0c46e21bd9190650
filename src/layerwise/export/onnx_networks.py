"""The graphs of LLaMA-like decoders, GPT-2 and BERT-like encoders, in plain operators of ONNX.

A decoder takes and gives its KV cache: ``input_ids`` [batch, length], ``attention_mask`` [batch, past + length] and
``past_key_values.{i}.key`` / ``.value`` [batch, heads, past, width] (past may be 0) to ``logits`` and ``present.{i}…``,
the names that ONNX Runtime's tools use. Positions are counted from the mask. An encoder takes ``input_ids``,
``attention_mask`` and ``token_type_ids``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from layerwise.encoding.dense import Dense
from layerwise.encoding.encoded import Encoded
from layerwise.errors import InputError
from layerwise.export.onnx_graph import Graph
from layerwise.export.onnx_weights import Weights
from layerwise.network.artifact import Artifact

HIDDEN = float(np.finfo(np.float32).min)  # the score of a place that must not be seen


class Source:
    """An artifact's parameters as nodes."""

    def __init__(self, artifact: Artifact, graph: Graph, fetch: Callable[[str], Encoded]) -> None:
        self.artifact, self.graph, self.fetch = artifact, graph, fetch
        self.weights = Weights(graph)
        self.plain = set(artifact.plain)
        self.config = artifact.config
        self._vectors: dict[str, str] = {}

    def has(self, parameter: str) -> bool:
        return parameter in self.plain or parameter.removesuffix(".weight") in self.artifact.sites

    def vector(self, parameter: str) -> str:
        if parameter not in self._vectors:
            self._vectors[parameter] = self.graph.floats(self.artifact.checkpoint.read(parameter), parameter)
        return self._vectors[parameter]

    def form(self, module: str, transposed: bool) -> Encoded:
        """The matrix [out, in] of a module, plain ones in the dense form."""
        if module in self.artifact.sites:
            return self.fetch(module)
        values = self.artifact.checkpoint.read(f"{module}.weight")
        return Dense(values.T.contiguous() if transposed else values)

    def linear(self, module: str, x: str, transposed: bool = False) -> str:
        y = self.weights.product(self.form(module, transposed), x, f"{module}.weight")
        bias = f"{module}.bias"
        return self.graph.node("Add", y, self.vector(bias)) if bias in self.plain else y

    def rows(self, module: str, index: str) -> str:
        return self.weights.rows(self.form(module, False), index, f"{module}.weight")

    def layer_norm(self, module: str, x: str, epsilon: float) -> str:
        weight, bias = self.vector(f"{module}.weight"), self.vector(f"{module}.bias")
        return self.graph.node("LayerNormalization", x, weight, bias, epsilon=epsilon, axis=-1)

    def rms_norm(self, module: str, x: str, epsilon: float) -> str:
        graph = self.graph
        square = graph.node("ReduceMean", graph.node("Mul", x, x), graph.ints(-1), keepdims=1)
        root = graph.node("Sqrt", graph.node("Add", square, graph.number(epsilon)))
        return graph.node("Mul", graph.node("Div", x, root), self.vector(f"{module}.weight"))


def gelu(graph: Graph, x: str, kind: str) -> str:
    if kind not in ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu"):
        raise InputError(f"the onnx export knows gelu, gelu_new and relu between the matrices, not {kind}")
    if kind == "relu":
        return graph.node("Relu", x)
    return graph.node("Gelu", x, approximate="none" if kind == "gelu" else "tanh")


def heads_of(graph: Graph, x: str, heads: int, width: int) -> str:
    """[batch, length, heads * width] -> [batch, heads, length, width]."""
    return graph.node("Transpose", graph.node("Reshape", x, graph.ints(0, 0, heads, width)), perm=[0, 2, 1, 3])


def attention(graph: Graph, q: str, k: str, v: str, mask: str, width: int) -> str:
    """Heads [batch, heads, length, width] and what is added to the scores -> [batch, length, heads * width]."""
    scores = graph.node("MatMul", q, graph.node("Transpose", k, perm=[0, 1, 3, 2]))
    scores = graph.node("Add", graph.node("Mul", scores, graph.number(1 / math.sqrt(width))), mask)
    mixed = graph.node("MatMul", graph.node("Softmax", scores, axis=-1), v)
    return graph.node("Reshape", graph.node("Transpose", mixed, perm=[0, 2, 1, 3]), graph.ints(0, 0, -1))


def hidden_where_not(graph: Graph, seen: str) -> str:
    """A boolean mask as what is added to scores."""
    return graph.node("Where", seen, graph.number(0.0), graph.number(HIDDEN))


class Decoder:
    """What the causal graphs share: inputs, positions, mask and cache."""

    def __init__(self, source: Source, blocks: int, heads: int, width: int) -> None:
        self.source, self.graph = source, source.graph
        self.heads, self.width = heads, width
        graph = self.graph
        self.tokens = graph.input("input_ids", "INT64", ["batch", "length"])
        mask = graph.input("attention_mask", "INT64", ["batch", "total"])
        shape: list[str | int] = ["batch", heads, "past", width]
        names = [f"past_key_values.{i}" for i in range(blocks)]
        self.past = [
            (graph.input(f"{n}.key", "FLOAT", shape), graph.input(f"{n}.value", "FLOAT", shape)) for n in names
        ]
        length = graph.node("Shape", self.tokens, start=1, end=2)
        total = graph.node("Shape", mask, start=1, end=2)
        past = graph.node("Sub", total, length)
        places = graph.node(
            "Range", self._scalar(graph.ints(0)), self._scalar(total), self._scalar(graph.ints(1))
        )  # fmt: skip
        own = graph.node("Unsqueeze", graph.node("Slice", places, past, total, graph.ints(0)), graph.ints(1))
        before = graph.node("LessOrEqual", graph.node("Unsqueeze", places, graph.ints(0)), own)  # [length, total]
        shown = graph.node("Unsqueeze", graph.cast(mask, "BOOL"), graph.ints(1, 2))  # [batch, 1, 1, total]
        self.mask = hidden_where_not(graph, graph.node("And", before, shown))
        counted = graph.node("Sub", graph.node("CumSum", mask, self._scalar(graph.ints(1))), graph.ints(1))
        counted = graph.node("Max", counted, graph.ints(0))
        self.positions = graph.node("Slice", counted, past, total, graph.ints(1))  # [batch, length]

    def _scalar(self, one: str) -> str:
        return self.graph.node("Squeeze", one, self.graph.ints(0))

    def cached(self, index: int, k: str, v: str) -> tuple[str, str]:
        """Keys and values with those of the past before them, which also leave the graph."""
        graph = self.graph
        k, v = (graph.node("Concat", old, new, axis=2) for old, new in zip(self.past[index], (k, v), strict=True))
        for value, name in ((k, "key"), (v, "value")):
            graph.output(value, f"present.{index}.{name}", ["batch", self.heads, "total", self.width])
        return k, v

    def logits(self, hidden: str, table: str, words: int) -> None:
        source = self.source
        module = "lm_head" if source.has("lm_head.weight") and not source.config.get("tie_word_embeddings") else table
        self.graph.output(source.linear(module, hidden), "logits", ["batch", "length", words])
        self.graph.outputs.insert(0, self.graph.outputs.pop())


def llama(source: Source) -> None:
    graph, config = source.graph, source.config
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        raise InputError("the onnx export knows attention over the whole context, and the network has a sliding window")
    heads = int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    width = int(config.get("head_dim") or config["hidden_size"] // heads)
    epsilon, blocks = float(config["rms_norm_eps"]), int(config["num_hidden_layers"])
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"the onnx export knows silu between the matrices, not {config['hidden_act']}")
    decoder = Decoder(source, blocks, groups, width)
    turned = _rotary(source, decoder.positions)
    hidden = source.rows("model.embed_tokens", decoder.tokens)
    for i in range(blocks):
        block = f"model.layers.{i}"
        x = source.rms_norm(f"{block}.input_layernorm", hidden, epsilon)
        q, k, v = (
            heads_of(graph, source.linear(f"{block}.self_attn.{name}_proj", x), count, width)
            for name, count in (("q", heads), ("k", groups), ("v", groups))
        )
        if source.has(f"{block}.self_attn.q_norm.weight"):
            q = source.rms_norm(f"{block}.self_attn.q_norm", q, epsilon)
            k = source.rms_norm(f"{block}.self_attn.k_norm", k, epsilon)
        k, v = decoder.cached(i, turned(k, width), v)
        if heads != groups:
            k, v = (_repeated(graph, value, groups, heads // groups, width) for value in (k, v))
        mixed = attention(graph, turned(q, width), k, v, decoder.mask, width)
        hidden = graph.node("Add", hidden, source.linear(f"{block}.self_attn.o_proj", mixed))
        x = source.rms_norm(f"{block}.post_attention_layernorm", hidden, epsilon)
        gate = source.linear(f"{block}.mlp.gate_proj", x)
        gate = graph.node("Mul", gate, graph.node("Sigmoid", gate))
        x = graph.node("Mul", gate, source.linear(f"{block}.mlp.up_proj", x))
        hidden = graph.node("Add", hidden, source.linear(f"{block}.mlp.down_proj", x))
    decoder.logits(source.rms_norm("model.norm", hidden, epsilon), "model.embed_tokens", int(config["vocab_size"]))


def _repeated(graph: Graph, value: str, groups: int, times: int, width: int) -> str:
    """[batch, groups, length, width] -> [batch, groups * times, length, width], each group so often."""
    wide = graph.node("Unsqueeze", value, graph.ints(2))
    shape = graph.node("Concat", graph.ints(1, 1, times, 1, 1), axis=0)
    return graph.node("Reshape", graph.node("Expand", wide, shape), graph.ints(0, groups * times, -1, width))


def _rotary(source: Source, positions: str) -> Callable[[str, int], str]:
    """A function that turns heads by the angles of their positions, as transformers' own module has them."""
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    graph = source.graph
    config = transformers.AutoConfig.for_model(**source.config)
    settings = config.rope_parameters
    kind = settings.get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise InputError(f"the onnx export knows rotary angles that do not depend on the length, not {kind}")
    if kind == "default":
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        steps = torch.arange(0, width, 2, dtype=torch.int64).float() / width
        frequencies, scale = 1.0 / settings["rope_theta"] ** steps, 1.0
    else:
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    place = graph.node("Unsqueeze", graph.cast(positions, "FLOAT"), graph.ints(1, 3))  # [batch, 1, length, 1]
    angles = graph.node("Mul", place, graph.constant(frequencies.float().numpy()))
    angles = graph.node("Concat", angles, angles, axis=-1)
    cos, sin = (graph.node("Mul", graph.node(f, angles), graph.number(float(scale))) for f in ("Cos", "Sin"))

    def turned(x: str, width: int) -> str:
        first, second = graph.nodes_of("Split", [x], 2, axis=-1, num_outputs=2)
        across = graph.node("Concat", graph.node("Neg", second), first, axis=-1)
        return graph.node("Add", graph.node("Mul", x, cos), graph.node("Mul", across, sin))

    return turned


def gpt2(source: Source) -> None:
    graph, config = source.graph, source.config
    heads, blocks = int(config["n_head"]), int(config["n_layer"])
    width, epsilon = int(config["n_embd"]) // heads, float(config["layer_norm_epsilon"])
    if config.get("scale_attn_by_inverse_layer_idx") or not config.get("scale_attn_weights", True):
        raise InputError("the onnx export of GPT-2 scales attention by the square root of the head's width alone")
    decoder = Decoder(source, blocks, heads, width)
    hidden = source.rows("transformer.wte", decoder.tokens)
    hidden = graph.node("Add", hidden, source.rows("transformer.wpe", decoder.positions))
    for i in range(blocks):
        block = f"transformer.h.{i}"
        x = source.linear(f"{block}.attn.c_attn", source.layer_norm(f"{block}.ln_1", hidden, epsilon), True)
        q, k, v = (heads_of(graph, p, heads, width) for p in graph.nodes_of("Split", [x], 3, axis=-1, num_outputs=3))
        k, v = decoder.cached(i, k, v)
        mixed = attention(graph, q, k, v, decoder.mask, width)
        hidden = graph.node("Add", hidden, source.linear(f"{block}.attn.c_proj", mixed, True))
        x = source.linear(f"{block}.mlp.c_fc", source.layer_norm(f"{block}.ln_2", hidden, epsilon), True)
        x = gelu(graph, x, config.get("activation_function", "gelu_new"))
        hidden = graph.node("Add", hidden, source.linear(f"{block}.mlp.c_proj", x, True))
    hidden = source.layer_norm("transformer.ln_f", hidden, epsilon)
    decoder.logits(hidden, "transformer.wte", int(config["vocab_size"]))


def bert(source: Source) -> None:
    """``last_hidden_state``, with ``pooler_output`` and class ``logits`` where the network has them."""
    graph, config = source.graph, source.config
    heads, epsilon = int(config["num_attention_heads"]), float(config["layer_norm_eps"])
    size = int(config["hidden_size"])
    width = size // heads
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise InputError("the onnx export knows absolute positions in a BERT")
    root = "" if source.has("embeddings.word_embeddings.weight") else "bert."
    shape = ["batch", "length"]
    tokens, mask, types = (
        graph.input(name, "INT64", shape) for name in ("input_ids", "attention_mask", "token_type_ids")
    )
    length = graph.node("Shape", tokens, start=1, end=2)
    first, count, step = (graph.node("Squeeze", v, graph.ints(0)) for v in (graph.ints(0), length, graph.ints(1)))
    places = graph.node("Unsqueeze", graph.node("Range", first, count, step), graph.ints(0))
    hidden = source.rows(f"{root}embeddings.word_embeddings", tokens)
    hidden = graph.node("Add", hidden, source.rows(f"{root}embeddings.token_type_embeddings", types))
    hidden = graph.node("Add", hidden, source.rows(f"{root}embeddings.position_embeddings", places))
    hidden = source.layer_norm(f"{root}embeddings.LayerNorm", hidden, epsilon)
    seen = hidden_where_not(graph, graph.node("Unsqueeze", graph.cast(mask, "BOOL"), graph.ints(1, 2)))
    for i in range(int(config["num_hidden_layers"])):
        block = f"{root}encoder.layer.{i}"
        q, k, v = (
            heads_of(graph, source.linear(f"{block}.attention.self.{name}", hidden), heads, width)
            for name in ("query", "key", "value")
        )
        x = source.linear(f"{block}.attention.output.dense", attention(graph, q, k, v, seen, width))
        hidden = source.layer_norm(f"{block}.attention.output.LayerNorm", graph.node("Add", x, hidden), epsilon)
        x = gelu(graph, source.linear(f"{block}.intermediate.dense", hidden), config.get("hidden_act", "gelu"))
        x = source.linear(f"{block}.output.dense", x)
        hidden = source.layer_norm(f"{block}.output.LayerNorm", graph.node("Add", x, hidden), epsilon)
    graph.output(hidden, "last_hidden_state", [*shape, size])
    if not source.has(f"{root}pooler.dense.weight"):
        return
    start = graph.node("Gather", hidden, graph.constant(np.array(0, np.int64)), axis=1)
    pooled = graph.node("Tanh", source.linear(f"{root}pooler.dense", start))
    graph.output(pooled, "pooler_output", ["batch", size])
    if source.has("classifier.weight"):
        graph.output(source.linear("classifier", pooled), "logits", ["batch", "classes"])


NETWORKS: dict[str, Callable[[Source], Any]] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": llama,
    "Qwen2ForCausalLM": llama,
    "Qwen3ForCausalLM": llama,
    "GPT2LMHeadModel": gpt2,
    "BertModel": bert,
    "BertForSequenceClassification": bert,
}


def network_of(architecture: str) -> Callable[[Source], Any]:
    """The function that writes an architecture's graph; raises ``InputError`` naming those that there are."""
    if architecture not in NETWORKS:
        raise InputError(f"the onnx export knows {', '.join(NETWORKS)}, not {architecture}")
    return NETWORKS[architecture]
