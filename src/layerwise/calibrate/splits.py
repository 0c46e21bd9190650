"""Dividing text into fit, judge and steer, and into batches of tokens.

Encoders see *fit*; damages are computed on *judge*, since an encoder that was fitted to some tokens looks too good on
them; decisions that look at measured quality use *steer*. When no evaluation text is given, a tenth of the documents
is set aside first and labelled as being of the same source.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerwise.calibrate.text import Text
from layerwise.errors import InputError
from layerwise.network.streaming import Batch

SHARES = {"fit": 0.45, "judge": 0.35, "steer": 0.20}
HELD_OUT = 0.10
FEWEST_TOKENS = 256  # a split with fewer tokens than this measures nothing
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Splits:
    """Batches of each split. ``all`` is what the plain baseline calibrates on."""

    fit: tuple[Batch, ...]
    judge: tuple[Batch, ...]
    steer: tuple[Batch, ...]

    @property
    def all(self) -> tuple[Batch, ...]:
        return (*self.fit, *self.judge, *self.steer)

    def counts(self) -> dict[str, int]:
        return {name: tokens_in(getattr(self, name)) for name in SHARES}

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for batch in self.all:
            digest.update(repr(tuple(batch.tokens.shape)).encode())
            digest.update(batch.tokens.numpy().tobytes())
            if batch.pixels is not None:
                digest.update(repr(tuple(batch.pixels.shape)).encode())
                digest.update(batch.pixels.numpy().tobytes())
        return digest.hexdigest()


def tokens_in(batches: Sequence[Batch]) -> int:
    return sum(int(b.counted.sum()) for b in batches)


def shuffled(documents: Sequence[tuple[str, ...]], seed: int) -> list[tuple[str, ...]]:
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    return [documents[i] for i in order]


def set_aside(text: Text, seed: int) -> tuple[Text, Text]:
    """(calibration text, held-out text of the same source): every tenth document, in shuffled order."""
    documents = shuffled(text.documents, seed)
    count = max(1, round(HELD_OUT * len(documents)))
    return Text(text.source, tuple(documents[count:])), Text(f"{text.source} (set aside)", tuple(documents[:count]))


def make_splits(text: Text, tokenizer: Any, causal: bool, sequences: int, length: int, seed: int) -> Splits:
    """Fit, judge and steer batches of at most ``sequences * length`` tokens in all.

    A causal network reads windows of ``length`` tokens cut from each document's text; any other network reads each
    line as a text of its own, cut at ``length``.
    """
    fewest = math.ceil(FEWEST_TOKENS / (min(SHARES.values()) * length))
    if sequences < fewest:
        raise InputError(
            f"{sequences} sequences of {length} tokens are too few to calibrate on; give at least "
            f"--sequences {fewest} at --length {length}"
        )
    documents = shuffled(text.documents, seed)
    found: dict[str, tuple[Batch, ...]] = {}
    start = 0.0
    for name, share in SHARES.items():
        stop = start + share
        part = documents[round(start * len(documents)) : round(stop * len(documents))]
        start = stop
        found[name] = batches_of(part, tokenizer, causal, share * sequences, length)
        if tokens_in(found[name]) < FEWEST_TOKENS:
            raise InputError(
                f"the calibration text {text.source} is too short: its {name} split has {tokens_in(found[name])} "
                f"tokens where {FEWEST_TOKENS} are the least; give more text or a smaller --length"
            )
    return Splits(**found)


def batches_of(
    documents: Sequence[tuple[str, ...]], tokenizer: Any, causal: bool, sequences: float, length: int
) -> tuple[Batch, ...]:
    """Batches of up to ``sequences * length`` tokens, documents in the given order."""
    if causal:
        return _windows(documents, tokenizer, max(1, round(sequences)), length)
    return _texts(documents, tokenizer, max(length, round(sequences * length)), length)


def _windows(documents: Sequence[tuple[str, ...]], tokenizer: Any, sequences: int, length: int) -> tuple[Batch, ...]:
    tokens: list[int] = []
    for document in documents:
        tokens += tokenizer("\n".join(document) + "\n", add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) >= sequences * length:
            break
    if len(tokens) < 2 * length:  # a short text still makes windows, only shorter ones
        length = max(1, min(length, len(tokens) // 2))
    count = min(sequences, len(tokens) // length)
    windows = torch.tensor(tokens[: count * length], dtype=torch.int64).view(count, length)
    return tuple(Batch(part, None) for part in windows.split(max(1, BATCH_TOKENS // length)))


def _texts(documents: Sequence[tuple[str, ...]], tokenizer: Any, budget: int, length: int) -> tuple[Batch, ...]:
    texts: list[list[int]] = []
    taken = 0
    for document in documents:
        for ids in tokenizer(list(document), truncation=True, max_length=length, verbose=False)["input_ids"]:
            if ids and taken < budget:
                texts.append(ids)
                taken += len(ids)
    return padded_batches(texts, tokenizer)


def padded_batches(texts: Sequence[list[int]], tokenizer: Any) -> tuple[Batch, ...]:
    """Texts sorted by length (then by content, so that the order is one) and padded into batches."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    batches: list[Batch] = []
    ordered = sorted(texts, key=lambda ids: (len(ids), ids))
    while ordered:
        count = max(1, min(64, BATCH_TOKENS // max(1, len(ordered[0]))))
        while count > 1 and len(ordered[min(count, len(ordered)) - 1]) * count > 2 * BATCH_TOKENS:
            count -= 1
        part, ordered = ordered[:count], ordered[count:]
        batches.append(pad_texts(part, pad))
    return tuple(batches)


def pad_texts(texts: Sequence[list[int]], pad: int) -> Batch:
    width = max(len(ids) for ids in texts)
    tokens = torch.full((len(texts), width), pad, dtype=torch.int64)
    mask = torch.zeros((len(texts), width), dtype=torch.int64)
    for row, ids in enumerate(texts):
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        mask[row, : len(ids)] = 1
    return Batch(tokens, None if bool(mask.all()) else mask)


def first_tokens(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """As many batches as it takes to have this many tokens."""
    out: list[Batch] = []
    for batch in batches:
        if out and tokens_in(out) >= tokens:
            break
        out.append(batch)
    return out
