"""The act *evaluate the cache*: what it costs to keep keys and values in fewer bits.

A prefill writes all keys and values through the cache and reads them back, so that every token sees exactly what it
would see in decoding: one pass over a window measures all its positions. Both networks are in memory, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerwise.calibrate.splits import batches_of
from layerwise.calibrate.text import Text
from layerwise.generate.cache import check_kind
from layerwise.generate.network import CausalNetwork
from layerwise.jobs.generating import check_generates, open_speaker
from layerwise.network.network import Network
from layerwise.network.streaming import Batch


@dataclass(frozen=True)
class CacheQuality:
    """Held-out metrics with the cache in one form, and its bytes for each token."""

    kind: str
    metrics: dict[str, float]  # kl per token to the dense network, agreement, perplexity
    bytes_a_token: float
    plain_bytes_a_token: float


def check_cache(network: Network, kind: str) -> None:
    """``InputError`` for a kind that does not exist, or a network without keys and values to keep."""
    check_kind(kind)
    check_generates(network.architecture)


def evaluate_cache(
    artifact: str,
    dense: str,
    kind: str,
    text: Text,
    sequences: int,
    length: int,
    advance: Callable[[], None] = lambda: None,
) -> CacheQuality:
    """Measure an artifact over a stored cache against the dense network over a plain one."""
    ours = open_speaker(artifact, "float32")
    theirs = open_speaker(dense, "float32")
    batches = batches_of(text.documents, theirs.tokenizer, True, sequences, length)
    return cache_quality(ours.network, theirs.network, [b.tokens for b in _small(batches)], kind, advance)


def _small(batches: Sequence[Batch]) -> list[Batch]:
    """A few windows at a time: scores of every word at every position are in memory."""
    return [b.rows(i, i + 4) for b in batches for i in range(0, len(b.tokens), 4)]


@torch.inference_mode()
def cache_quality(
    network: CausalNetwork,
    reference: CausalNetwork,
    windows: Sequence[Tensor],
    kind: str,
    advance: Callable[[], None] = lambda: None,
) -> CacheQuality:
    """``network`` over a cache of this kind against ``reference`` over a plain one, on windows ``[n, length]``."""
    kl = agreed = likelihood = sizes = plain_sizes = 0.0
    count = predicted = 0
    for tokens in windows:
        rows, length = tokens.shape
        dense, plain_bytes = _predictions(reference, tokens, "16")
        stored, stored_bytes = _predictions(network, tokens, kind)
        kl += float((dense.exp() * (dense - stored)).sum(-1).double().sum())
        agreed += float((dense.argmax(-1) == stored.argmax(-1)).sum())
        follows = tokens[:, 1:, None].to(stored.device)
        likelihood += float(stored[:, :-1].gather(-1, follows).double().sum())
        count += rows * length
        predicted += rows * (length - 1)
        sizes, plain_sizes = stored_bytes / (rows * length), plain_bytes / (rows * length)
        advance()
    metrics: dict[str, Any] = {
        "kl": max(0.0, kl / max(1, count)),
        "agreement": agreed / max(1, count),
        "perplexity": math.exp(-likelihood / max(1, predicted)),
    }
    return CacheQuality(kind, metrics, sizes, plain_sizes)


def _predictions(network: CausalNetwork, tokens: Tensor, kind: str) -> tuple[Tensor, int]:
    """Log-probabilities ``[n, length, words]`` over a cache, and the cache's bytes."""
    rows, length = tokens.shape
    session = network.session(rows, length, kind)
    return session.full(tokens).float().log_softmax(-1), session.cache.nbytes
