"""The fixtures are what the other tests take them for: loadable, seeded, and alive."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_sentences_are_distinct(sentences: Path) -> None:
    lines = sentences.read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines)) == 400


def test_network_loads_with_its_tokenizer(tiny_network: Path, sentences: Path) -> None:
    import torch
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(tiny_network)
    network = getattr(transformers, config.architectures[0]).from_pretrained(tiny_network).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_network)
    text = sentences.read_text(encoding="utf-8").splitlines()[:3]
    batch = tokenizer(text, padding=True, return_tensors="pt", return_token_type_ids=False)
    assert int(batch["input_ids"].max()) < config.vocab_size
    assert tokenizer.pad_token_id == config.pad_token_id
    with torch.no_grad():
        out = network(**batch)[0]
    assert torch.isfinite(out).all()
    assert (out[0] - out[1]).abs().max() > 0.01, "the output does not depend on the input"


def test_same_seed_gives_the_same_weights(build, causal_tokenizer) -> None:  # type: ignore[no-untyped-def]
    torch = pytest.importorskip("torch")
    from transformers import GPT2Config, GPT2LMHeadModel

    before = torch.random.get_rng_state()
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 8}
    a, b = (build(GPT2LMHeadModel, GPT2Config, causal_tokenizer, 3, **sizes) for _ in range(2))
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert torch.equal(before, torch.random.get_rng_state())
