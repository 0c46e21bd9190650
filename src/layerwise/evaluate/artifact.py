"""The act *evaluate* on a saved artifact: quality against the dense network, size, latency and memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.calibrate.splits import batches_of
from layerwise.calibrate.text import Text
from layerwise.encoding.inputs import InputGrid
from layerwise.errors import InputError
from layerwise.evaluate.compare import Measured, body_of, compare
from layerwise.evaluate.latency import forward_seconds, open_for_time
from layerwise.evaluate.sentences import pair_batches, spearman
from layerwise.loss import Loss, loss_of
from layerwise.network.artifact import Artifact, open_artifact
from layerwise.network.module import ModuleNetwork
from layerwise.network.network import Network, open_network
from layerwise.network.streaming import Batch


@dataclass(frozen=True)
class ArtifactQuality:
    """Metrics of the dense network and of the artifact on the same text.

    library_blocks: how many of the artifact's blocks the compiled library computed when it was timed, and of how many.
    activations: those of the artifact with the inputs of its linears quantized as was asked for; None if it was not.
    cache: those of the artifact with keys and values kept as was asked for; None if it was not.
    """

    dense: dict[str, Any]
    artifact: dict[str, Any]
    bytes: int
    dense_bytes: int
    latency_ms: float
    library_blocks: tuple[int, int]
    tokens: int
    activations: dict[str, Any] | None = None
    cache: dict[str, Any] | None = None


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
    inputs: Mapping[str, InputGrid] | None = None,
) -> ArtifactQuality:
    """Stream both networks over the text, then time the artifact in memory on the first batch.

    inputs: site -> a grid for its inputs, to be measured beside what the artifact itself says.
    """
    network = open_network(dense)
    artifact = open_artifact(path)
    if artifact.config.get("tie_word_embeddings") is False:
        network = network.untied()  # a rewrite gave the artifact a head of its own
    check_same_network(artifact, network)
    loss = loss_of(network.architecture, network.checkpoint.directory, pooling)
    windows = loss.causal
    index = None
    if text.pairs and loss.kind == "distance":
        batches, index = pair_batches(text.pairs, tokenizer, length)
    else:
        batches = batches_of(text.documents, tokenizer, windows, sequences, length)
    with tempfile.TemporaryDirectory(prefix="layerwise-") as scratch:
        variants = {"artifact": artifact, **({"activations": artifact.giving(inputs)} if inputs else {})}
        found = compare(network, variants, loss, batches, Path(scratch), advance=advance)
    module, by_library = open_for_time(path)
    return ArtifactQuality(
        dense=_with_spearman(found["dense"], index, text, seed),
        artifact=_with_spearman(found["artifact"], index, text, seed),
        bytes=artifact.size,
        dense_bytes=network.checkpoint.safetensors_bytes,
        latency_ms=1e3 * forward_seconds(module, batches[0].rows(0, 1)),
        library_blocks=by_library,
        tokens=sum(int(b.counted.sum()) for b in batches),
        activations=_with_spearman(found["activations"], index, text, seed) if inputs else None,
    )


def evaluate_on_images(
    path: str,
    network: Network,
    loss: Loss,
    batches: Sequence[Batch],
    advance: Callable[[], None] = lambda: None,
    inputs: Mapping[str, InputGrid] | None = None,
) -> ArtifactQuality:
    """The same for a network that reads images; with labels the metrics include top-1."""
    artifact = open_artifact(path)
    check_same_network(artifact, network)
    with tempfile.TemporaryDirectory(prefix="layerwise-") as scratch:
        variants = {"artifact": artifact, **({"activations": artifact.giving(inputs)} if inputs else {})}
        found = compare(network, variants, loss, batches, Path(scratch), advance=advance)
    module, by_library = open_for_time(path, network.original if isinstance(network, ModuleNetwork) else None)
    return ArtifactQuality(
        dense=dict(found["dense"].metrics),
        artifact=dict(found["artifact"].metrics),
        bytes=artifact.size,
        dense_bytes=network.checkpoint.safetensors_bytes,
        latency_ms=1e3 * forward_seconds(module, batches[0].rows(0, 1)),
        library_blocks=by_library,
        tokens=sum(int(b.counted.sum()) for b in batches),
        activations=dict(found["activations"].metrics) if inputs else None,
    )


def check_same_network(artifact: Artifact, network: Network) -> None:
    """``InputError`` unless the artifact holds every parameter of the dense network, in its shape."""
    if artifact.checkpoint.architecture != network.architecture:
        raise InputError(
            f"{artifact.directory} is a {artifact.checkpoint.architecture}, but {network.checkpoint.directory} is a "
            f"{network.architecture}; give the dense network that it was made from"
        )
    shapes = {name: tuple(artifact.checkpoint.tensors[name].shape) for name in artifact.plain}
    for name, site in artifact.sites.items():
        shapes[f"{name}.weight"] = site.shape
    for name, parameter in body_of(artifact, network).module.named_parameters():
        if shapes.get(name) != tuple(parameter.shape):
            raise InputError(
                f"{artifact.directory} has {list(shapes[name]) if name in shapes else 'nothing'} for {name}, but "
                f"{network.checkpoint.directory} has {list(parameter.shape)}; "
                f"give the dense network that it was made from"
            )


def _with_spearman(found: Measured, index: Any, text: Text, seed: int) -> dict[str, Any]:
    out: dict[str, Any] = dict(found.metrics)
    if index is not None and found.vectors is not None:
        out["stsb_spearman"], out["stsb_low"], out["stsb_high"] = spearman(found.vectors, index, text.pairs, seed)
    return out
