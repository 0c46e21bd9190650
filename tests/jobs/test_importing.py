"""GGUF files as networks and as artifacts: every weight and token comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import DECODER
from tests.export.artifacts import artifact

from layerwise.errors import InputError
from layerwise.export.gguf import export_gguf
from layerwise.jobs.importing import import_gguf
from layerwise.network.artifact import open_artifact
from layerwise.network.gguf_file import GgufTensor, read_header, write
from layerwise.network.network import open_network


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def source(tiny_llama: Path, tmp_path: Path) -> tuple[Path, Path]:
    """An artifact in 8 bits (down projections in fp16, for their 172 columns) and its GGUF file."""
    first = artifact(tiny_llama, tmp_path / "first", "rtn:bits=8,group=32,symmetric=true")
    export_gguf(first, tmp_path / "x.gguf", reencode=True)
    import_gguf(tmp_path / "x.gguf", tmp_path / "kept")
    return tmp_path / "kept", tmp_path / "x.gguf"


def test_encodings_are_kept_and_come_back(source: tuple[Path, Path], tmp_path: Path):
    kept, file = source
    export_gguf(kept, tmp_path / "again.gguf")
    first, second = open_network(file), open_network(tmp_path / "again.gguf")
    for name, _ in first.module.named_parameters():
        assert torch.equal(first.read(name), second.read(name)), name
    stored, original = open_artifact(kept), open_artifact(tmp_path / "first")
    for site in stored.sites:
        assert torch.equal(stored.encoded(site).decode(), original.encoded(site).decode())
        assert stored.specs[site]["bits"] == 8


def test_rows_and_tokens(source: tuple[Path, Path], tmp_path: Path):
    from transformers import AutoTokenizer

    kept, file = source
    network = open_network(file)
    index = torch.tensor([5, 3, 3, 100])
    table = network.read("model.embed_tokens.weight")
    assert torch.equal(network.read_rows("model.embed_tokens.weight", index), table[index])
    network.checkpoint.check_finite()
    first, second = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "first", kept))
    text = "The old baker's boat, 12 — ünï <s>"
    assert first(text).input_ids == second(text).input_ids


def test_it_loads_and_says_what_the_first_one_said(source: tuple[Path, Path]):
    from layerwise.network.load import load

    tokens = torch.arange(3, 40)[None]
    first, second = (load(folder, dtype=torch.float32) for folder in (source[0].parent / "first", source[0]))
    with torch.inference_mode():
        assert torch.allclose(first(tokens).logits, second(tokens).logits, atol=2e-2)  # fp16 down projections


def test_a_sentencepiece_tokenizer_comes_back(shared: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    first = artifact(shared / "models" / "stories260k", tmp_path / "first", "rtn:bits=8,group=32,symmetric=true")
    export_gguf(first, tmp_path / "x.gguf", reencode=True)
    import_gguf(tmp_path / "x.gguf", tmp_path / "kept")
    one, two = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("first", "kept"))
    for text in ("Once upon a time", "  Lily's dog — 漢字\n\nü!"):
        assert one(text).input_ids == two(text).input_ids
        assert one.decode(one(text).input_ids) == two.decode(two(text).input_ids)


def test_what_is_not_a_llama_of_ours_is_refused(source: tuple[Path, Path], tiny_gpt2: Path, tmp_path: Path):
    export_gguf(artifact(tiny_gpt2, tmp_path / "gpt2", "rtn:bits=4,group=32"), tmp_path / "g.gguf", reencode=True)
    with pytest.raises(InputError, match="gpt2"):
        open_network(tmp_path / "g.gguf")
    with pytest.raises(InputError, match="there is no GGUF file"):
        import_gguf(tmp_path / "absent.gguf", tmp_path / "o")
    values, _ = read_header(source[1])
    layout = {"token_embd.weight": ("F32", (2, 256)), "output_norm.weight": ("F32", (64,))}
    data = {"token_embd.weight": np.zeros(2048, np.uint8), "output_norm.weight": np.ones(64, np.float32)}
    write(tmp_path / "k.gguf", values, layout, lambda name: [data[name]])
    with pytest.raises(InputError, match=r"output_norm|model.layers|shape|holds"):
        import_gguf(tmp_path / "k.gguf", tmp_path / "o")
    whole = (tmp_path / "k.gguf").read_bytes()
    at = whole.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
    (tmp_path / "k.gguf").write_bytes(whole[:at] + bytes([20]) + whole[at + 1 :])
    with pytest.raises(InputError, match=r"type number 20; layerwise reads .*Q4_K"):
        import_gguf(tmp_path / "k.gguf", tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.fixture
def wide_llama(build: Any, causal_tokenizer: Any) -> Path:
    """A LLaMA of one block whose matrices are all of 256 columns."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sides = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    return build(LlamaForCausalLM, LlamaConfig, causal_tokenizer, 21, tie_word_embeddings=True, **DECODER | sides)


def test_blocks_of_256_columns_are_kept_byte_for_byte(wide_llama: Path, tmp_path: Path):
    """Grids of one step for 256 columns go out as K-quants; those come in as blocks, run, and go out again."""
    from layerwise.network.load import load

    first = artifact(wide_llama, tmp_path / "first", "rtn:bits=4,group=256", "rtn:bits=6,group=256,symmetric=true")
    export_gguf(first, tmp_path / "x.gguf")
    kinds = {tensor.kind.name for tensor in read_header(tmp_path / "x.gguf")[1].values()}
    assert {"Q4_K", "Q6_K"} <= kinds
    import_gguf(tmp_path / "x.gguf", tmp_path / "kept")
    stored, original = open_artifact(tmp_path / "kept"), open_artifact(first)
    assert {spec["form"] for spec in stored.specs.values()} == {"superblock"}
    for site in stored.sites:
        assert torch.equal(stored.encoded(site).decode(), original.encoded(site).decode()), site
    tokens = torch.arange(3, 40)[None]
    one, two = (load(tmp_path / name, dtype=torch.float32) for name in ("first", "kept"))
    with torch.inference_mode():
        assert torch.allclose(one(tokens).logits, two(tokens).logits, atol=1e-4)
    export_gguf(tmp_path / "kept", tmp_path / "again.gguf")
    before, after = (read_header(tmp_path / name)[1] for name in ("x.gguf", "again.gguf"))
    for name, tensor in before.items():
        assert bytes_of(tmp_path / "x.gguf", tensor) == bytes_of(tmp_path / "again.gguf", after[name]), name


def bytes_of(file: Path, tensor: GgufTensor) -> bytes:
    return file.read_bytes()[tensor.start : tensor.start + tensor.nbytes]


@pytest.mark.shared
@pytest.mark.parametrize("kind", ["Q2_K", "Q4_K_M", "Q5_K_M", "TQ2_0"])
def test_files_of_llama_cpps_quantizer_are_kept_and_mean_the_same(kind: str, shared: Path, tmp_path: Path):
    """llama.cpp quantizes a network of width 256; ours says what llama.cpp says of the file, and gives it back."""
    import ctypes

    llama_cpp = pytest.importorskip("llama_cpp")
    from layerwise.network.load import load

    export_gguf(artifact(shared / "models" / "stories5m", tmp_path / "first", "dense"), tmp_path / "f16.gguf")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), 1
    file = tmp_path / "x.gguf"
    done = llama_cpp.llama_model_quantize(
        str(tmp_path / "f16.gguf").encode(), str(file).encode(), ctypes.byref(settings)
    )
    assert done == 0
    import_gguf(file, tmp_path / "kept")
    export_gguf(tmp_path / "kept", tmp_path / "again.gguf")
    before, after = read_header(file)[1], read_header(tmp_path / "again.gguf")[1]
    packed = [name for name, tensor in before.items() if tensor.kind.columns == 256]
    assert len(packed) > 30
    for name in packed:
        assert before[name].kind == after[name].kind
        assert bytes_of(file, before[name]) == bytes_of(tmp_path / "again.gguf", after[name]), name

    theirs = llama_cpp.Llama(str(file), n_ctx=64, n_threads=1, verbose=False, logits_all=True)
    tokens = theirs.tokenize(b"Once upon a time there was a little dog who", add_bos=True, special=False)
    theirs.eval(tokens)
    with torch.inference_mode():
        ours = load(tmp_path / "kept", dtype=torch.float32)(torch.tensor(tokens)[None]).logits[0].log_softmax(1)
    said = torch.from_numpy(np.array(theirs.scores[: len(tokens)])).log_softmax(1)
    # llama.cpp rounds the inputs of packed weights to 8 bits
    assert float((said.exp() * (said - ours)).sum(1).mean()) < 0.02
