"""The tokenizer inside a GGUF file as ``tokenizer.json`` and ``tokenizer_config.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from layerwise.errors import InputError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# The rule that cuts text into words -> llama.cpp's name for it.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
RULES = {_CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe", _CONTRACTIONS + r"\p{N}" + _REST: "qwen2"}
IGNORE_MERGES = {"llama-bpe"}  # llama.cpp looks whole words up first under these rules
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' name -> llama.cpp's


def write_tokenizer(values: dict[str, Any], folder: Path, where: Path) -> None:
    """Write both files; raises ``InputError`` for a tokenizer that layerwise cannot build."""
    tokens = values.get("tokenizer.ggml.tokens")
    kinds = values.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(text, str) for text in tokens):
        raise InputError(f"{where} has no list of tokens")
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        kinds = [NORMAL] * len(tokens)
    try:
        built = _built(values, tokens, kinds, where)
        settings = _settings(values, tokens)
        _frame(built, values, settings, tokens)
        text = built.to_str(pretty=False)
    except InputError:
        raise
    except Exception as reason:  # tokenizers raises plain exceptions for merges of tokens that are not there
        raise InputError(f"{where} has a tokenizer that cannot be built: {str(reason)[:120]}") from None
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _built(values: dict[str, Any], tokens: list[str], kinds: list[int], where: Path) -> Any:
    from tokenizers import AddedToken, Tokenizer

    model = values.get("tokenizer.ggml.model")
    vocabulary = {text: number for number, text in enumerate(tokens)}
    if model == "gpt2":
        built = Tokenizer(_bytes(values, vocabulary, where))
        _words(built, values.get("tokenizer.ggml.pre"), where)
    elif model == "llama":
        built = Tokenizer(_pieces(values, tokens, kinds, vocabulary))
        _spaces(built, values.get("tokenizer.ggml.add_space_prefix", True))
    else:
        raise InputError(f"{where} has a tokenizer of type {model!r}; layerwise reads gpt2 and llama")
    special = [
        AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == CONTROL
    ]
    own = [AddedToken(t, special=False, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == USER]
    built.add_special_tokens(special)
    built.add_tokens(own)
    return built


def _bytes(values: dict[str, Any], vocabulary: dict[str, int], where: Path) -> Any:
    from tokenizers import models

    merges = values.get("tokenizer.ggml.merges", [])
    if not isinstance(merges, list) or not all(isinstance(merge, str) and " " in merge for merge in merges):
        raise InputError(f"{where} has merges that are no pairs of tokens")
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    return models.BPE(vocabulary, pairs, ignore_merges=values.get("tokenizer.ggml.pre") in IGNORE_MERGES)


def _words(built: Any, rule: Any, where: Path) -> None:
    from tokenizers import Regex, decoders, pre_tokenizers

    built.decoder = decoders.ByteLevel()
    if rule == "gpt-2":
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return
    pattern = next((pattern for pattern, name in RULES.items() if name == rule), None)
    if pattern is None:
        raise InputError(
            f"{where} cuts text into words by the rule {rule!r}; layerwise knows gpt-2, {', '.join(RULES.values())}"
        )
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.pre_tokenizer = pre_tokenizers.Sequence([cut, as_bytes])


def _pieces(values: dict[str, Any], tokens: list[str], kinds: list[int], vocabulary: dict[str, int]) -> Any:
    """SentencePiece: every way to make a token of two others is a merge, in the order of the tokens' scores."""
    from tokenizers import models

    scores = values.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        scores = [0.0] * len(tokens)
    found = []
    for number, (text, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind != NORMAL:
            continue
        for cut in range(1, min(len(text), 256)):
            left, right = vocabulary.get(text[:cut]), vocabulary.get(text[cut:])
            if left is not None and right is not None:
                found.append((-float(scores[number]), number, left, right))
    merges = [(tokens[left], tokens[right]) for _, _, left, right in sorted(found)]
    unknown = next((text for text, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    return models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in kinds)


def _spaces(built: Any, prefix: Any) -> None:
    from tokenizers import decoders, normalizers

    steps = [normalizers.Prepend("▁")] if prefix is not False else []
    built.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    ends = [decoders.Strip(" ", 1, 0)] if prefix is not False else []
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )  # fmt: skip


def _settings(values: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in SPECIAL.items():
        number = values.get(f"tokenizer.ggml.{key}_token_id")
        if type(number) is int and 0 <= number < len(tokens):
            settings[f"{name}_token"] = tokens[number]
    if isinstance(values.get("tokenizer.chat_template"), str):
        settings["chat_template"] = values["tokenizer.chat_template"]
    return settings


def _frame(built: Any, values: dict[str, Any], settings: dict[str, Any], tokens: list[str]) -> None:
    from tokenizers import processors

    spm = values.get("tokenizer.ggml.model") == "llama"
    before = values.get("tokenizer.ggml.add_bos_token", spm) is True and "bos_token" in settings
    after = values.get("tokenizer.ggml.add_eos_token", False) is True and "eos_token" in settings
    if not before and not after:
        return
    bos, eos = settings.get("bos_token", ""), settings.get("eos_token", "")
    single = [*([bos] if before else []), "$A", *([eos] if after else [])]
    pair = [*single, *([f"{bos}:1"] if before else []), "$B:1", *([f"{eos}:1"] if after else [])]
    special = [(text, tokens.index(text)) for text, used in ((bos, before), (eos, after)) if used]
    built.post_processor = processors.TemplateProcessing(
        single=" ".join(single), pair=" ".join(pair), special_tokens=list(dict(special).items())
    )
