"""``layerwise fit``, and generating with what it made; contexts and streamed blocks."""

from __future__ import annotations

import json
from pathlib import Path

from tests.command import layerwise

PROMPT = "The old baker repairs"


def test_a_head_is_fitted_and_used(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    out = tmp_path / "head"
    done = layerwise("fit", "eagle:steps=3,batch=2,length=16", tiny_llama, out, "--text", sentences, "--threads", "1")
    assert done.code == 0, done.err
    written = json.loads((out / "method.json").read_text(encoding="utf-8"))
    assert written["method"] == f"eagle:head={out}" and f"--method eagle:head={out}" in done.out
    options = ("--prompt", PROMPT, "--max-new-tokens", "12", "--json")
    plain = layerwise("generate", tiny_llama, *options).json
    found = layerwise("generate", tiny_llama, *options, "--method", f"{written['method']},width=2").json
    assert found["tokens"] == plain["tokens"] and found["drafted"] > 0
    again = layerwise("fit", "eagle", tiny_llama, out, "--text", sentences)
    assert again.code == 2 and "exists" in again.err


def test_heads_of_attention_are_fitted(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    done = layerwise("fit", "act:windows=4,length=12", tiny_llama, tmp_path / "act", "--text", sentences, "--json")
    assert done.code == 0, done.err
    assert done.json["method"].startswith("act:heads=")
    found = layerwise("generate", tiny_llama, "--prompt", PROMPT, "--method", done.json["method"], "--json")
    assert found.code == 0, found.err


def test_what_cannot_be_fitted_is_refused(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    done = layerwise("fit", "plain", tiny_llama, tmp_path / "out", "--text", sentences)
    assert done.code == 2 and "nothing to learn" in done.err and "eagle" in done.err
    done = layerwise("fit", "eagle", tiny_llama, tmp_path / "out", "--text", tmp_path / "none.txt")
    assert done.code == 2 and "there is no text file" in done.err
    done = layerwise("generate", tiny_llama, "--prompt", PROMPT, "--method", "eagle")
    assert done.code == 2 and "layerwise fit eagle" in done.err


def test_a_context_stands_before_the_prompt(tiny_llama: Path) -> None:
    options = ("--max-new-tokens", "6", "--json")
    both = layerwise("generate", tiny_llama, "--prompt", f"Bread is baked.\n{PROMPT}", *options).json
    found = layerwise("generate", tiny_llama, "--context", "Bread is baked.", "--prompt", PROMPT, *options).json
    assert found["tokens"] == both["tokens"]
    method = ("--method", "adacad")
    found = layerwise("generate", tiny_llama, "--context", "Bread is baked.", "--prompt", PROMPT, *options, *method)
    assert found.code == 0 and found.json["mean_strength"][0] > 0


def test_blocks_are_streamed(tiny_llama: Path) -> None:
    options = ("--prompt", PROMPT, "--max-new-tokens", "6", "--json")
    plain = layerwise("generate", tiny_llama, *options).json
    found = layerwise("generate", tiny_llama, *options, "--method", "sora").json
    assert found["tokens"] == plain["tokens"] and found["held_bytes"] <= found["block_bytes"]
