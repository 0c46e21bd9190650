from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import layerwise
from layerwise.errors import InputError
from layerwise.network.artifact import open_artifact
from layerwise.network.packed import Packed, PackedHead

TINY = {
    "tiny_llama": "AutoModelForCausalLM",
    "tiny_gpt2": "AutoModelForCausalLM",
    "tiny_qwen2": "AutoModelForCausalLM",
    "tiny_bert": "AutoModel",
    "tiny_bert_classifier": "AutoModelForSequenceClassification",
    "tiny_masked": "AutoModelForMaskedLM",
}
TOKENS = torch.tensor([[5, 9, 20, 33, 7], [8, 8, 41, 2, 6]])


@pytest.fixture(scope="module")
def tiny_masked(build: Any, encoder_tokenizer: Any) -> Path:
    """``BertForMaskedLM``: a head tied to the table, whose bias is its parent's."""
    from transformers import BertConfig, BertForMaskedLM

    values = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    return build(BertForMaskedLM, BertConfig, encoder_tokenizer, 17, initializer_range=0.1, **values)


def decoded(source: Path, out: Path) -> torch.nn.Module:
    """The dense network with every parameter replaced by what the artifact decodes to."""
    import transformers

    artifact = open_artifact(out)
    network = getattr(transformers, artifact.checkpoint.architecture).from_pretrained(source)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(artifact.read(name))
    return network


def output(network: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network(TOKENS)[0]


@pytest.mark.parametrize("name", TINY)
def test_every_way_in_computes_the_decoded_network(
    name: str, request: pytest.FixtureRequest, pack: Any, tmp_path: Path
):
    import transformers

    source = request.getfixturevalue(name)
    out = pack(source)
    loaded = layerwise.load(out)
    architecture = json.loads((source / "config.json").read_text())["architectures"][0]
    assert type(loaded).__name__ == architecture and not loaded.training
    expected = output(decoded(source, out))
    assert torch.allclose(output(loaded), expected, atol=1e-5)
    assert any(isinstance(m, Packed) for m in loaded.modules())
    # The class itself, and the Auto class; nothing missing, nothing left over.
    for kind in (architecture, TINY[name]):
        again, report = getattr(transformers, kind).from_pretrained(out, output_loading_info=True)
        assert torch.equal(output(again), output(loaded))
        assert not any(report.values())
    # Saved again: the very same weights, and it loads again.
    again.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert torch.equal(output(layerwise.load(tmp_path / "saved")), output(loaded))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_another_type_keeps_what_is_packed(tiny_llama: Path, pack: Any, dtype: torch.dtype, tmp_path: Path):
    out = pack(tiny_llama)
    network = layerwise.load(out, dtype=dtype)
    assert output(network).dtype == network.dtype == dtype
    tensors = open_artifact(out).checkpoint.tensors
    for name, module in network.named_modules():
        if isinstance(module, Packed):
            assert all(module.get_buffer(b).dtype == tensors[f"{name}.{b}"].dtype for b in module.stored)
    wide = network.to(torch.float32)
    assert torch.allclose(output(wide), output(layerwise.load(out)), atol=0.05)


def test_tied_heads_stay_tied(tiny_llama: Path, pack: Any):
    network = layerwise.load(pack(tiny_llama))
    table, head = network.get_input_embeddings(), network.get_output_embeddings()
    assert isinstance(head, PackedHead) and head.table is table and head.weight is table.weight
    before = output(network)
    network.tie_weights()
    assert torch.equal(output(network), before)
    made = network.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=3, do_sample=False)
    assert made.shape == (2, 8)


def test_a_bare_model_and_the_model_under_its_head(tiny_llama: Path, pack: Any, tmp_path: Path):
    from transformers import AutoModel, AutoModelForCausalLM

    out = pack(tiny_llama)
    bare = AutoModel.from_pretrained(out)
    bare.save_pretrained(tmp_path / "bare")
    assert torch.equal(output(AutoModel.from_pretrained(tmp_path / "bare")), output(bare))
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path / "bare")), output(layerwise.load(out)))


def test_shards(tiny_llama: Path, pack: Any, tmp_path: Path):
    network = layerwise.load(pack(tiny_llama))
    network.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(output(layerwise.load(tmp_path / "shards")), output(network))


def test_sentence_transformers(tiny_bert: Path, pack: Any, tmp_path: Path):
    library = pytest.importorskip("sentence_transformers")
    library.SentenceTransformer(str(tiny_bert)).save(str(tmp_path / "dense"))
    dense = library.SentenceTransformer(str(tmp_path / "dense"))
    out = pack(tmp_path / "dense", recipe="rtn:bits=8,group=16")
    assert (out / "1_Pooling" / "config.json").is_file()
    packed = library.SentenceTransformer(str(out))
    lines = ["The old baker counts seven letters.", "A quiet pilot"]
    first, second = packed.encode(lines), dense.encode(lines)
    assert abs(first - second).max() < 0.05 and abs(first - second).max() > 0
    packed.save(str(tmp_path / "again"))
    assert (library.SentenceTransformer(str(tmp_path / "again")).encode(lines) == first).all()
    assert packed.half().encode(lines).dtype.name == "float16"


# ---------------------------------------------------------------- the hook

ORDERS = {
    "layerwise first, and a reload": (
        "import layerwise, transformers.quantizers.auto as auto, importlib\n"
        "assert 'layerwise' in auto.AUTO_QUANTIZER_MAPPING\n"
        "auto.AUTO_QUANTIZER_MAPPING.clear(); importlib.reload(auto)"
    ),
    "transformers first": "import transformers.quantizers.auto, layerwise",
}


@pytest.mark.parametrize("order", ORDERS)
def test_import_orders(order: str):
    code = f"""
import sys
{ORDERS[order]}
from transformers.quantizers import auto
assert auto.AUTO_QUANTIZER_MAPPING["layerwise"].__name__ == "LayerwiseQuantizer"
assert "layerwise" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING and "gptq" in auto.AUTO_QUANTIZER_MAPPING
assert type(auto.__spec__.loader).__module__ == "_frozen_importlib_external"
layerwise.install(), layerwise.install()
assert sum(type(f).__module__.startswith("layerwise") for f in sys.meta_path) == 1
"""
    run(code)


def test_importing_is_light():
    run(
        """
import sys, layerwise
assert not {"torch", "transformers", "numpy", "scipy"} & set(sys.modules), sorted(sys.modules)
assert "load" in dir(layerwise) and layerwise.InputError.__name__ == "InputError"
try:
    layerwise.unheard_of
except AttributeError as reason:
    assert "unheard_of" in str(reason)
else:
    raise SystemExit("no AttributeError")
"""
    )


def test_folders_named_as_an_act_can_be_called():
    run(
        """
import layerwise
from layerwise.plan.tree import Leaf
import layerwise.plan.tree as tree
assert tree.Leaf is Leaf and layerwise.plan.tree is tree and callable(layerwise.plan)
assert callable(layerwise.calibrate) and callable(layerwise.evaluate)
"""
    )


def run(code: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(layerwise.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]


# ---------------------------------------------------------------- damage


def test_what_does_not_fit_is_named(tiny_llama: Path, pack: Any):
    out = pack(tiny_llama)
    config = json.loads((out / "config.json").read_text())
    site = "model.layers.0.mlp.up_proj"
    stored = config["quantization_config"]["sites"][site]["encoded"]

    def load_with(**change: Any) -> None:
        entry = {"encoded": stored | change}
        described = config["quantization_config"]
        changed = described | {"sites": described["sites"] | {site: entry}}
        (out / "config.json").write_text(json.dumps(config | {"quantization_config": changed}))
        layerwise.load(out)

    with pytest.raises(InputError, match=f"site {site} is stored as"):
        load_with(shape=[64, 172])
    with pytest.raises(InputError, match=f"site {site} cannot be restored"):
        load_with(bits=5)
    with pytest.raises(InputError, match=f"site {site} cannot be restored"):
        load_with(form="unheard")
    (out / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalML"]}))
    with pytest.raises(InputError, match=r"did you mean .*LlamaForCausalLM"):
        layerwise.load(out)
