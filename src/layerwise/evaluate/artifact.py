"""The act *evaluate* on a saved artifact: quality against the dense network, size, latency and memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.calibrate.splits import batches_of
from layerwise.calibrate.text import Text
from layerwise.evaluate.compare import Measured, compare
from layerwise.evaluate.latency import forward_seconds
from layerwise.evaluate.sentences import pair_batches, spearman
from layerwise.loss import loss_of
from layerwise.network.artifact import open_artifact
from layerwise.network.load import load
from layerwise.network.network import open_network


@dataclass(frozen=True)
class ArtifactQuality:
    """Metrics of the dense network and of the artifact on the same text."""

    dense: dict[str, Any]
    artifact: dict[str, Any]
    bytes: int
    dense_bytes: int
    latency_ms: float
    tokens: int


def evaluate_artifact(
    path: str,
    dense: str,
    text: Text,
    tokenizer: Any,
    pooling: str | None = None,
    sequences: int = 256,
    length: int = 256,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> ArtifactQuality:
    """Stream both networks over the text, then time the artifact in memory on the first batch."""
    network = open_network(dense)
    artifact = open_artifact(path)
    loss = loss_of(network.architecture, network.checkpoint.directory, pooling)
    windows = loss.causal and not network.architecture.endswith("ForMaskedLM")
    index = None
    if text.pairs and loss.kind == "distance":
        batches, index = pair_batches(text.pairs, tokenizer, length)
    else:
        batches = batches_of(text.documents, tokenizer, windows, sequences, length)
    with tempfile.TemporaryDirectory(prefix="layerwise-") as scratch:
        found = compare(network, {"artifact": artifact}, loss, batches, Path(scratch), advance=advance)
    module = load(path)
    return ArtifactQuality(
        dense=_with_spearman(found["dense"], index, text, seed),
        artifact=_with_spearman(found["artifact"], index, text, seed),
        bytes=artifact.size,
        dense_bytes=network.checkpoint.safetensors_bytes,
        latency_ms=1e3 * forward_seconds(module, batches[0].rows(0, 1)),
        tokens=sum(int(b.counted.sum()) for b in batches),
    )


def _with_spearman(found: Measured, index: Any, text: Text, seed: int) -> dict[str, Any]:
    out: dict[str, Any] = dict(found.metrics)
    if index is not None and found.vectors is not None:
        out["stsb_spearman"], out["stsb_low"], out["stsb_high"] = spearman(found.vectors, index, text.pairs, seed)
    return out


