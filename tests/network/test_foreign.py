"""Checkpoints quantized by other tools open with their encodings kept, bit for bit, and hostile ones are refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.network.quantized_elsewhere import edited, quantized

from layerwise.encoding.integer import GroupedInteger
from layerwise.errors import InputError
from layerwise.export.dense import export_dense
from layerwise.network.artifact import open_artifact
from layerwise.network.load import load
from layerwise.network.network import open_network

METHODS = [
    ("gptq", {"bits": 4, "symmetric": True}),
    ("gptq", {"bits": 4}),
    ("gptq", {"bits": 8, "group": 0}),
    ("gptq", {"bits": 2, "group": 32, "shifted": False, "config": {"checkpoint_format": "gptq_v2"}}),
    ("gptq", {"bits": 3, "group": 32, "symmetric": True}),
    ("awq", {"group": 32}),
    ("compressed-tensors", {"bits": 4, "symmetric": True}),
    ("compressed-tensors", {"bits": 4, "group": 0}),
    ("compressed-tensors", {"bits": 8, "group": 32}),
    ("compressed-tensors", {"bits": 3, "group": 32, "symmetric": True}),
    ("compressed-tensors", {"bits": 3, "group": 32, "symmetric": True, "loose": True}),
]


@pytest.mark.parametrize(("method", "how"), METHODS)
def test_what_the_codes_stand_for_is_kept(method: str, how: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    values = quantized(tiny_llama, tmp_path / "in", method, **how)
    network = open_network(tmp_path / "in")
    assert {s.parameter for s in network.tree.sites if network.kept_spec(s)} == set(values)
    for site in network.tree.sites:
        form, spec = network.kept(site), network.kept_spec(site)
        if form is None:
            continue
        assert isinstance(form, GroupedInteger) and form.spec() == spec
        assert torch.equal(form.decode(), values[site.parameter])
        assert torch.equal(network.read_site(site), values[site.parameter])
        assert form.grid.symmetric == how.get("symmetric", False) and form.grid.bits == how.get("bits", 4)
    untouched = network.read("model.embed_tokens.weight")
    assert torch.equal(untouched, load_file(tmp_path / "in" / "model.safetensors")["model.embed_tokens.weight"].float())


def test_it_is_exported_and_loaded(tiny_llama: Path, tmp_path: Path) -> None:
    import transformers

    values = quantized(tiny_llama, tmp_path / "in", "gptq")
    export_dense(tmp_path / "in", tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert all(torch.equal(dense[name], value.half()) for name, value in values.items())
    tokens = torch.arange(24)[None]
    module = load(tmp_path / "in", dtype=torch.float32)
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(module(tokens).logits, plain(tokens).logits, atol=2e-3)


def test_biases_that_the_network_lacks_are_left(tiny_llama: Path, tmp_path: Path) -> None:
    quantized(tiny_llama, tmp_path / "in", "gptq")
    file = tmp_path / "in" / "model.safetensors"
    extra = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64, dtype=torch.float16)}
    save_file({**load_file(file), **extra}, file, {"format": "pt"})
    assert not set(extra) & set(open_artifact(tmp_path / "in").plain)
    assert load(tmp_path / "in").model.layers[0].self_attn.q_proj.bias is None


REFUSED = [
    ("gptq", {"bits": 5}, "2, 3, 4 or 8 bits, not 5"),
    ("gptq", {"bits": True}, "2, 3, 4 or 8 bits"),
    ("gptq", {"bits": 8}, "has the shape"),
    ("gptq", {"group_size": 7}, "has the shape"),
    ("gptq", {"group_size": -2}, "group_size is a positive number"),
    ("gptq", {"sym": True}, "is said to be symmetric"),
    ("gptq", {"sym": "yes"}, "sym of a gptq checkpoint"),
    ("gptq", {"dynamic": {"x": {}}}, "dynamic settings"),
    ("gptq", {"checkpoint_format": "marlin"}, "'marlin' is not read"),
    ("gptq", {"quant_method": "awq", "version": "gemm"}, "fill|shape|packed"),
    ("awq", {"version": "gemv"}, "version 'gemv'"),
    ("awq", {"bits": 3}, "with 3 bits"),
    ("compressed-tensors", {"config_groups": {}}, "no config_groups"),
    ("compressed-tensors", {"config_groups": {"a": {"weights": {"num_bits": 99}}}}, "2 to 8 num_bits"),
    ("compressed-tensors", {"config_groups": {"a": {"weights": {"num_bits": 8, "group_size": 16}}}}, "no format that"),
    ("compressed-tensors", {"format": "float-quantized"}, "pack-quantized alone"),
    ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8}}, "with a kv_cache_scheme"),
    ("gptq", {"quant_method": "bitsandbytes"}, "start from the dense checkpoint"),
    ("gptq", {"quant_method": ["gptq"]}, "start from the dense checkpoint"),
]


@pytest.mark.parametrize(("method", "changes", "words"), REFUSED)
def test_what_is_not_read_is_refused(
    method: str, changes: dict[str, Any], words: str, tiny_llama: Path, tmp_path: Path
) -> None:
    quantized(tiny_llama, tmp_path / "in", method, group=32)
    edited(tmp_path / "in", changes)
    with pytest.raises(InputError, match=words):
        network = open_network(tmp_path / "in")
        for site in network.tree.sites:
            network.read_site(site)


def test_act_order_is_refused_when_it_is_opened(tiny_llama: Path, tmp_path: Path) -> None:
    quantized(tiny_llama, tmp_path / "in", "gptq")
    file = tmp_path / "in" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.g_idx"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"layers.0.self_attn.q_proj groups its inputs in an order of its own"):
        open_network(tmp_path / "in")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.fill_(0), "steps that are not positive"),
        (lambda t: t.fill_(float("nan")), "steps that are not positive"),
        (lambda t: -t, "steps that are not positive"),
        (lambda t: t.float() * 1.0001, "steps that are not positive numbers of fp16"),
    ],
)
def test_impossible_steps_are_refused(change: Any, words: str, tiny_llama: Path, tmp_path: Path) -> None:
    quantized(tiny_llama, tmp_path / "in", "compressed-tensors")
    file = tmp_path / "in" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    tensors[name] = change(tensors[name])
    save_file(tensors, file, {"format": "pt"})
    network = open_network(tmp_path / "in")
    with pytest.raises(InputError, match=words):
        network.read("model.layers.0.self_attn.q_proj.weight")


def test_a_zero_that_readers_disagree_on_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    quantized(tiny_llama, tmp_path / "in", "gptq")
    file = tmp_path / "in" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.qzeros"
    tensors[name] = torch.full_like(tensors[name], -1)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match="some readers of the format gptq take for 16 and some for 0"):
        open_network(tmp_path / "in").read("model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_tensors_of_random_shapes_and_types_never_crash(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Each tensor of a packed linear in turn gets another shape or type, or is left out."""
    quantized(tiny_llama, tmp_path / "in", method, group=32)
    file = tmp_path / "in" / "model.safetensors"
    sound = load_file(file)
    mine = [name for name in sound if name.startswith("model.layers.0.self_attn.q_proj.")]
    draw = random.Random(3)
    types = [torch.int32, torch.float16, torch.uint8, torch.int64, torch.bool]
    for name in mine:
        for _ in range(3):
            tensors = dict(sound)
            if draw.random() < 0.2:
                del tensors[name]
            else:
                sides = [draw.choice([0, 1, 2, 8, 16, 64, 65]) for _ in range(draw.randint(0, 3))]
                tensors[name] = torch.ones(sides).to(draw.choice(types))
            save_file(tensors, file, {"format": "pt"})
            try:
                network = open_network(tmp_path / "in")
                network.read("model.layers.0.self_attn.q_proj.weight")
            except InputError:
                continue
            # What still opens must be harmless: a missing index of groups, or ones for an optional tensor.
            assert name.endswith("g_idx") or tensors.get(name, sound[name]).shape == sound[name].shape
