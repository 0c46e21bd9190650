"""Sentence pairs with human scores (STS-B): Spearman's rank correlation and its bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerwise.calibrate.splits import padded_batches
from layerwise.network.streaming import Batch

Pairs = Sequence[tuple[str, str, float]]
RESAMPLES = 1000


def pair_batches(pairs: Pairs, tokenizer: Any, length: int) -> tuple[tuple[Batch, ...], Tensor]:
    """(batches of the distinct sentences, index ``[pairs, 2]`` of each pair's rows in batch order)."""
    sentences = sorted({s for first, second, _ in pairs for s in (first, second)})
    ids = tokenizer(sentences, truncation=True, max_length=length, verbose=False)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), ids[i]))
    place = {sentences[original]: row for row, original in enumerate(order)}
    index = torch.tensor([[place[first], place[second]] for first, second, _ in pairs])
    return padded_batches(ids, tokenizer), index


def spearman(vectors: Tensor, index: Tensor, pairs: Pairs, seed: int) -> tuple[float, float, float]:
    """(Spearman of cosine similarity with the scores, and its 95 % bootstrap interval over pairs)."""
    from scipy.stats import rankdata

    similarity = (vectors[index[:, 0]] * vectors[index[:, 1]]).sum(1).double().numpy()
    scores = np.array([score for _, _, score in pairs])

    def correlation(rows: np.ndarray) -> float:
        a, b = rankdata(similarity[rows]), rankdata(scores[rows])
        return float(np.corrcoef(a, b)[0, 1])

    everything = np.arange(len(scores))
    generator = np.random.default_rng(seed)
    resampled = [correlation(generator.integers(0, len(scores), len(scores))) for _ in range(RESAMPLES)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return correlation(everything), float(low), float(high)
