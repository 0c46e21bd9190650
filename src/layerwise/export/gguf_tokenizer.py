"""A tokenizer as transformers stores it (``tokenizer.json``), in the terms of llama.cpp.

llama.cpp knows two families that hold a BPE: ``llama`` (SentencePiece: spaces become ▁, unknown characters become bytes
``<0x..>``, and the pair whose joined token has the highest *score* is merged first) and ``gpt2`` (bytes as printable
characters, a named rule that cuts text into words, and a list of merges). A score says less than a merge, so a
SentencePiece-style tokenizer is accepted only where each token's score can be taken from the rank of its first merge,
and any other rule that llama.cpp has no name for is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from layerwise.errors import InputError
from layerwise.network.gguf_file import Value
from layerwise.network.gguf_tokenizer import (
    BYTE,
    CONTROL,
    IGNORE_MERGES,
    NORMAL,
    RULES,
    SPECIAL,
    UNKNOWN,
    UNUSED,
    USER,
)

NEVER = -1e9  # the score of a token that no merge makes


def tokenizer_values(folder: Path, size: int) -> dict[str, Value]:
    """The keys ``tokenizer.…`` for a network with ``size`` words; raises ``InputError`` where there is no equal."""
    path = folder / "tokenizer.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        model = stored["model"]
        kind, vocabulary = model.get("type"), model["vocab"]
    except OSError:
        raise InputError(f"{folder} needs tokenizer.json and tokenizer_config.json to be exported to gguf") from None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is no tokenizer that layerwise can read") from None
    if kind != "BPE" or not isinstance(vocabulary, dict):
        raise InputError(f"{path} is a tokenizer of type {kind}; the gguf export knows BPE")
    added = {entry["content"]: entry for entry in stored.get("added_tokens") or []}
    vocabulary = {**vocabulary, **{text: entry["id"] for text, entry in added.items()}}
    if max(vocabulary.values()) >= size:
        raise InputError(f"{path} has token {max(vocabulary.values())}, but the network has {size} words")
    texts = {number: text for text, number in vocabulary.items()}
    tokens = [texts.get(number, f"[PAD{number}]") for number in range(size)]
    kinds = [_kind(text, vocabulary, added, model) for text in tokens]
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model.get("merges", [])]

    pieces = bool(model.get("byte_fallback"))
    values: dict[str, Value] = {"tokenizer.ggml.model": "llama" if pieces else "gpt2"}
    if pieces:
        _check_pieces(stored, path)
        values["tokenizer.ggml.pre"] = "default"
        values["tokenizer.ggml.tokens"] = tokens
        values["tokenizer.ggml.scores"] = _scores(tokens, merges, path)
        values["tokenizer.ggml.token_type"] = kinds
        values["tokenizer.ggml.add_space_prefix"] = _prepends(stored)
    else:
        rule = _word_rule(stored, path)
        if bool(model.get("ignore_merges")) != (rule in IGNORE_MERGES):
            raise InputError(f"{path} and llama.cpp's rule {rule} differ in ignore_merges")
        values["tokenizer.ggml.pre"] = rule
        values["tokenizer.ggml.tokens"] = tokens
        values["tokenizer.ggml.token_type"] = kinds
        values["tokenizer.ggml.merges"] = [" ".join(pair) for pair in merges]
    return values | _special(stored, settings, vocabulary, path)


def _kind(text: str, vocabulary: dict[str, int], added: dict[str, Any], model: dict[str, Any]) -> int:
    if text not in vocabulary:
        return UNUSED
    if text == model.get("unk_token"):
        return UNKNOWN
    if text in added:
        return CONTROL if added[text].get("special") else USER
    is_byte = bool(model.get("byte_fallback")) and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return BYTE if is_byte else NORMAL


def _scores(tokens: list[str], merges: list[tuple[str, ...]], path: Path) -> list[float]:
    """Minus the rank of the first merge that makes a token; the merges of one token must follow one another."""
    first: dict[str, int] = {}
    previous = ""
    for rank, pair in enumerate(merges):
        made = "".join(pair)
        if made in first and made != previous:
            raise InputError(f"{path} ranks two merges into {made!r} apart, which scores of tokens cannot say")
        first.setdefault(made, rank)
        previous = made
    return [-float(first[text]) if text in first else NEVER for text in tokens]


def _steps(part: Any, inner: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    if part is None:
        return []
    return list(part[inner]) if part.get("type") == "Sequence" else [part]


def _check_pieces(stored: dict[str, Any], path: Path) -> None:
    known = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    steps = _steps(stored.get("normalizer"), "normalizers")
    rest = [step for step in steps if step.get("type") != "Prepend"]
    words = _steps(stored.get("pre_tokenizer"), "pretokenizers")
    metaspace = len(words) == 1 and words[0].get("type") == "Metaspace" and words[0].get("split") is False
    if not ((rest == known and not words) or (not steps and metaspace)):
        raise InputError(f"{path} changes text in a way that llama.cpp's SentencePiece tokenizer does not")


def _prepends(stored: dict[str, Any]) -> bool:
    steps = _steps(stored.get("normalizer"), "normalizers")
    words = _steps(stored.get("pre_tokenizer"), "pretokenizers")
    return any(s.get("type") == "Prepend" for s in steps) or any(w.get("prepend_scheme") != "never" for w in words)


def _word_rule(stored: dict[str, Any], path: Path) -> str:
    steps = _steps(stored.get("pre_tokenizer"), "pretokenizers")
    normal = _steps(stored.get("normalizer"), "normalizers")
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise InputError(f"{path} does not cut text into bytes as llama.cpp's gpt2 tokenizer does")
    if len(steps) == 1 and steps[0].get("use_regex", True) and not normal:
        return "gpt-2"
    if len(steps) == 2 and steps[0].get("type") == "Split" and not steps[-1].get("use_regex", True):
        pattern = steps[0].get("pattern", {}).get("Regex")
        if pattern in RULES and all(step.get("type") == "NFC" for step in normal):
            return RULES[pattern]
    raise InputError(f"{path} cuts text into words by a rule that llama.cpp has no name for")


def _special(stored: dict[str, Any], settings: dict[str, Any], words: dict[str, int], path: Path) -> dict[str, Value]:
    values: dict[str, Value] = {}
    numbers = {}
    for key, name in SPECIAL.items():
        text = settings.get(f"{key}_token")
        text = text.get("content") if isinstance(text, dict) else text
        if isinstance(text, str) and text in words:
            numbers[key] = words[text]
            values[f"tokenizer.ggml.{name}_token_id"] = words[text]
    before, after = _frame(stored.get("post_processor"), path)
    for key, frame in (("bos", before), ("eos", after)):
        if frame and (len(frame) > 1 or words.get(frame[0]) != numbers.get(key)):
            raise InputError(f"{path} puts {' '.join(frame)} around a text, which llama.cpp does not")
        values[f"tokenizer.ggml.add_{key}_token"] = bool(frame)
    template = settings.get("chat_template")
    if isinstance(template, str):
        values["tokenizer.chat_template"] = template
    return values


def _frame(processor: Any, path: Path) -> tuple[list[str], list[str]]:
    """The special tokens before and after a single text."""
    found: tuple[list[str], list[str]] = [], []
    steps = processor["processors"] if processor and processor.get("type") == "Sequence" else [processor]
    for step in steps:
        if step is None or step.get("type") == "ByteLevel":
            continue
        if step.get("type") != "TemplateProcessing":
            raise InputError(f"{path} frames texts by {step.get('type')}, which the gguf export does not know")
        side = 0
        for entry in step["single"]:
            if "Sequence" in entry:
                side = 1
            else:
                found[side].append(entry["SpecialToken"]["id"])
    return found
