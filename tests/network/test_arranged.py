"""Networks whose blocks are arranged: they reload in transformers and compute what the arrangement says."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.export.dense import export_dense
from layerwise.network.arranged import arrange_artifact, arranged, in_memory, write_arranged
from layerwise.network.arranged_blocks import ArrangedBlocks
from layerwise.network.arrangement import Arrangement, Extras, Step, arrangement, parse_arrangement
from layerwise.network.load import load
from layerwise.network.network import open_network
from layerwise.network.streaming import Streamer

MANY = {"num_hidden_layers": 4}
TOKENS = torch.tensor([[5, 9, 14, 3, 7, 11, 6, 4], [8, 8, 3, 10, 12, 5, 9, 13]])


@pytest.fixture(scope="module")
def deep(build: Any, causal_tokenizer: Any, encoder_tokenizer: Any) -> dict[str, Path]:
    """Networks of four blocks of three architectures."""
    from tests.conftest import DECODER, ENCODER
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    gpt2 = {"n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 64, "initializer_range": 0.1}
    return {
        "llama": build(LlamaForCausalLM, LlamaConfig, causal_tokenizer, 31, tie_word_embeddings=True, **DECODER | MANY),
        "gpt2": build(GPT2LMHeadModel, GPT2Config, causal_tokenizer, 32, bos_token_id=0, eos_token_id=1, **gpt2),
        "bert": build(BertModel, BertConfig, encoder_tokenizer, 33, **ENCODER | MANY),
    }


def reload(path: Path) -> Any:
    import transformers

    name = json.loads((path / "config.json").read_text())["architectures"][0]
    module = getattr(transformers, name).from_pretrained(path, dtype=torch.float32)
    return module.eval()


def output(module: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.inference_mode():
        found = module(input_ids=tokens, use_cache=False)
    return found.logits if "logits" in found else found.last_hidden_state


def blocks_of(module: Any) -> list[nn.Module]:
    return next(list(m) for m in module.modules() if isinstance(m, nn.ModuleList))


class Written(nn.Module):
    """A list of functions of the hidden state as one block."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.run = run
        self.attention_type = "full_attention"

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.run(lambda block, h: hidden_of(block(h, *args, **kwargs)), hidden)


def hidden_of(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def by_hand(path: Path, runs: list[Any]) -> Tensor:
    """The network with its list of blocks replaced by functions ``run(call, hidden)``."""
    module = reload(path)
    name, members = next((n, m) for n, m in module.named_modules() if isinstance(m, nn.ModuleList))
    blocks = list(members)
    module.set_submodule(name, nn.ModuleList([Written(lambda c, h, r=r: r(blocks, c, h)) for r in runs]))
    module.config.num_hidden_layers = len(runs)
    return output(module)


def one(i: int) -> Any:
    return lambda b, c, h: c(b[i], h)


CASES: list[tuple[str, Arrangement, list[Any]]] = [
    ("loop", arrangement([0, 1, 1, 2, 3]), [one(0), one(1), one(1), one(2), one(3)]),
    ("shared and dropped", arrangement([3, 0, 3]), [one(3), one(0), one(3)]),
    (
        "sum",
        arrangement([0, [2, 1], 3]),
        [one(0), lambda b, c, h: c(b[1], h) + c(b[2], h) - h, one(3)],
    ),
    (
        "mean twice",
        arrangement([0, [1, 2], [1, 2], 3], "mean"),
        [one(0), *[lambda b, c, h: (c(b[1], h) + c(b[2], h)) / 2] * 2, one(3)],
    ),
    (
        "newton, to the end",
        arrangement([0, Step((1, 2, 3), "newton", 3)]),
        [one(0), one(1), one(2), one(3)],
    ),
]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("case", CASES, ids=[c[0] for c in CASES])
def test_saved_and_reloaded(
    kind: str, case: tuple[str, Arrangement, list[Any]], deep: dict[str, Path], tmp_path: Path
) -> None:
    _, wanted, runs = case
    network = arranged(open_network(deep[kind]), wanted)
    size = write_arranged(network, tmp_path / "out")
    assert size == (tmp_path / "out/model.safetensors").stat().st_size
    expected = by_hand(deep[kind], runs)
    module = reload(tmp_path / "out")
    torch.testing.assert_close(output(module), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(output(in_memory(network)), expected, atol=2e-5, rtol=2e-5)
    # Shared weights are stored once, unused ones not at all.
    stored = {n.split(".")[n.split(".").index(p) + 1] for n in module.state_dict() for p in ("layers", "h", "layer")
              if p in n.split(".") and n.split(".")[n.split(".").index(p) + 1].isdigit()}  # fmt: skip
    assert len(stored) == wanted.renumbered()[0].blocks
    if kind == "llama":
        module.save_pretrained(tmp_path / "again")
        assert torch.equal(output(reload(tmp_path / "again")), output(module))
    if kind == "gpt2":
        assert torch.equal(output(load(tmp_path / "out", dtype=torch.float32)), output(module))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("case", CASES, ids=[c[0] for c in CASES])
def test_generates_with_a_cache_as_without(
    kind: str, case: tuple[str, Arrangement, list[Any]], deep: dict[str, Path], tmp_path: Path
) -> None:
    write_arranged(arranged(open_network(deep[kind]), case[1]), tmp_path / "out")
    module: Any = reload(tmp_path / "out")
    given: Any = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = module.generate(TOKENS, use_cache=True, **given)
    assert cached.shape[1] == TOKENS.shape[1] + 12
    assert torch.equal(cached, module.generate(TOKENS, use_cache=False, **given))
    with torch.inference_mode():
        cache = module(TOKENS, use_cache=True).past_key_values
    assert len(cache.layers) == case[1].uses and all(layer.get_seq_length() == 8 for layer in cache.layers)


def test_an_order_is_an_ordinary_checkpoint(deep: dict[str, Path], tmp_path: Path) -> None:
    network = arranged(open_network(deep["llama"]), arrangement([2, 0, 3]))
    assert network.arrangement is None
    write_arranged(network, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    torch.testing.assert_close(output(reload(tmp_path / "out")), by_hand(deep["llama"], [one(2), one(0), one(3)]))


def test_the_arrangement_of_all_blocks_is_the_network(deep: dict[str, Path]) -> None:
    network = open_network(deep["bert"])
    assert arranged(network, arrangement(range(4))) is network


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_extras_belong_to_one_use(kind: str, deep: dict[str, Path], tmp_path: Path) -> None:
    norm, linear = ("input_layernorm.weight", "self_attn.q_proj") if kind == "llama" else ("ln_1.weight", "attn.c_attn")
    wanted = Arrangement(arrangement([0, 1, 1]).steps, {2: Extras((norm,), {linear: 2})})
    block: Any = blocks_of(reload(deep[kind]))[1]
    weight = block.get_submodule(linear).weight
    out, into = weight.shape if kind == "llama" else reversed(weight.shape)
    gen = torch.Generator().manual_seed(5)
    left, right = 0.3 * torch.randn(out, 2, generator=gen), 0.3 * torch.randn(2, into, generator=gen)
    own = 1 + torch.rand(block.get_parameter(norm).shape, generator=gen)
    extras = {f"2.own.{norm}": own, f"2.left.{linear}.weight": left, f"2.right.{linear}.weight": right}
    network = arranged(open_network(deep[kind]), wanted, extras)
    write_arranged(network, tmp_path / "out")

    plain = reload(deep[kind])
    blocks = blocks_of(plain)
    other: Any = copy.deepcopy(blocks[1])
    with torch.no_grad():
        other.get_parameter(norm).copy_(own)
        change = left @ right
        other.get_submodule(linear).weight.add_(change if kind == "llama" else change.T)
    expected = by_hand(deep[kind], [one(0), one(1), lambda b, c, h: c(other, h)])
    torch.testing.assert_close(output(reload(tmp_path / "out")), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(output(in_memory(network)), expected, atol=2e-5, rtol=2e-5)
    assert network.tree.parameters == arranged(open_network(deep[kind]), arrangement([0, 1, 1])).tree.parameters + sum(
        v.numel() for v in extras.values()
    )
    with pytest.raises(InputError, match="extras do not fit"):
        arranged(open_network(deep[kind]), wanted, {})
    with pytest.raises(InputError, match="no such parameter"):
        arranged(open_network(deep[kind]), Arrangement(wanted.steps, {0: Extras(("nothing.weight",))}), {})


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_packed_artifact_is_arranged(kind: str, deep: dict[str, Path], pack: Any, tmp_path: Path) -> None:
    packed = pack(deep[kind], name="packed")
    size = arrange_artifact(packed, tmp_path / "out", arrangement([3, [0, 1], 3], "mean"))
    assert size < (packed / "model.safetensors").stat().st_size
    expected = by_hand(packed, [one(3), lambda b, c, h: (c(b[0], h) + c(b[1], h)) / 2, one(3)])
    module = reload(tmp_path / "out")
    torch.testing.assert_close(output(module), expected, atol=2e-5, rtol=2e-5)
    with pytest.raises(InputError, match="arranged already"):
        arrange_artifact(tmp_path / "out", tmp_path / "twice", arrangement([0, 0]))
    with pytest.raises(InputError, match="ordinary checkpoint"):
        export_dense(tmp_path / "out", tmp_path / "dense")
    arrange_artifact(packed, tmp_path / "fewer", arrangement([3, 0]))  # an order needs no arrangement
    torch.testing.assert_close(output(reload(tmp_path / "fewer")), by_hand(packed, [one(3), one(0)]))


@pytest.mark.parametrize(
    "value",
    [
        None, {}, {"steps": []}, {"steps": [0], "more": 1}, {"steps": [1]}, {"steps": [0, 2, 1]}, {"steps": [-1]},
        {"steps": [True]}, {"steps": [0.0]}, {"steps": [{"blocks": [0], "combine": "sum"}]},
        {"steps": [{"blocks": [0, 1], "combine": "max"}]}, {"steps": [{"blocks": [0, 1]}]},
        {"steps": [{"blocks": [0, 1], "combine": "newton", "rounds": 3}]},
        {"steps": [{"blocks": [0, 1], "combine": "sum", "rounds": 1}]},
        {"steps": [0] * 20000}, {"steps": [{"blocks": list(range(300)), "combine": "newton", "rounds": 300}]},
        {"steps": [0, 0], "extras": {"2": {"own": ["a"], "corrections": {}}}},
        {"steps": [0, 0], "extras": {"1": {"own": "a", "corrections": {}}}},
        {"steps": [0, 0], "extras": {"1": {"own": [], "corrections": {"a": 0}}}},
        {"steps": [0, 0], "extras": {"01": {"own": [], "corrections": {}}}},
        {"steps": [{"blocks": [0, "1"], "combine": "sum"}]}, {"steps": [[0, 1]]},
    ],
)  # fmt: skip
def test_a_damaged_arrangement_is_refused(value: Any) -> None:
    with pytest.raises(InputError):
        parse_arrangement(value)


def test_written_and_parsed() -> None:
    made = Arrangement(
        (Step((0,)), Step((1, 2), "newton", 2), Step((0, 1), "mean")), {3: Extras(("a.weight",), {"b": 2})}
    )
    assert parse_arrangement(json.loads(json.dumps(made.written()))) == made
    assert made.uses == 7 and made.serial == 4 and made.first_slots() == (0, 1, 5)


def test_what_would_compute_something_else_is_refused(
    deep: dict[str, Path], tiny_qwen3_moe: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="blocks 0 to 3"):
        arranged(open_network(deep["llama"]), arrangement([0, 4, 4]))
    with pytest.raises(InputError, match="not built like"):
        arranged(open_network(tiny_qwen3_moe), arrangement([0, 1, 1]))
    network = arranged(open_network(deep["llama"]), arrangement([0, 1, 1]))
    with pytest.raises(InputError, match="arranged already"):
        arranged(network, arrangement([0, 0]))
    with pytest.raises(InputError, match="block by block"):
        Streamer(network)
    write_arranged(network, tmp_path / "out")
    with pytest.raises(InputError, match="block by block"):
        Streamer(open_network(tmp_path / "out"))
    with pytest.raises(InputError, match="exists"):
        write_arranged(network, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["num_hidden_layers"] = 2
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="needs a config of as many blocks"):
        reload(tmp_path / "out")


def test_steps_look_like_blocks(deep: dict[str, Path]) -> None:
    module: Any = in_memory(open_network(deep["llama"]), arrangement([0, [1, 2], 3]))
    layers = module.model.layers
    assert isinstance(layers, ArrangedBlocks) and len(layers) == 3 and len(list(layers)) == 3
    assert layers[1].hidden_size == 64 and len(layers[:2]) == 2
    assert "4 LlamaDecoderLayer in 3 steps" in repr(layers)
