"""GGUF files as networks and as artifacts: every weight and token comes back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.export.artifacts import artifact

from layerwise.errors import InputError
from layerwise.export.gguf import export_gguf
from layerwise.jobs.importing import import_gguf
from layerwise.network.artifact import open_artifact
from layerwise.network.gguf_file import read_header, write
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
    for kind, size, said in (("Q4_K", 288, "of type Q4_K"), ("F32", 2048, "output_norm|model.layers|shape|holds")):
        layout = {"token_embd.weight": (kind, (2, 256)), "output_norm.weight": ("F32", (64,))}
        data = {"token_embd.weight": np.zeros(size, np.uint8), "output_norm.weight": np.ones(64, np.float32)}
        write(tmp_path / "k.gguf", values, layout, lambda name, data=data: [data[name]])
        with pytest.raises(InputError, match=said):
            import_gguf(tmp_path / "k.gguf", tmp_path / "o")
    assert not (tmp_path / "o").exists()
