"""Comparing stored networks with the dense one on the same tokens, block by block.

One pass: every variant's block ``i`` runs before any block ``i + 1``, hidden states wait on disk, and the tails of
the dense network and of one variant stand side by side for the loss. Memory is one block and two heads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from layerwise.calibrate.activations import Boundary
from layerwise.calibrate.forward import boundaries, enter_network, forward_block
from layerwise.loss import Loss, few_rows
from layerwise.network.artifact import Artifact
from layerwise.network.module import running
from layerwise.network.network import Network, hidden_width, output_width
from layerwise.network.overlay import Overlay
from layerwise.network.quantized_inputs import inputs_of, quantize_inputs
from layerwise.network.sites import find_sites
from layerwise.network.skeleton import build_on_meta, materialised, parameter_owners
from layerwise.network.streaming import Batch, Streamer, Weights, rows_at_once


@dataclass
class Measured:
    """Quality of one variant. ``metrics``: kl or distance, and perplexity for a causal network."""

    metrics: dict[str, float] = field(default_factory=dict)
    terms: int = 0
    vectors: Tensor | None = None  # [texts, width] in batch order, for a network that embeds


@torch.inference_mode()
def compare(
    network: Network,
    variants: Mapping[str, Weights],
    loss: Loss,
    batches: Sequence[Batch],
    folder: Path,
    device: str = "cpu",
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Measured]:
    """Measure every variant and the dense network itself (under the name ``dense``) on ``batches``.

    folder:  scratch space for hidden states; emptied again.
    advance: called once a block of each network, for progress.
    """
    if network.whole:
        return _compare_whole(network, variants, loss, batches, device, advance)
    named: dict[str, Weights] = {"dense": network, **variants}
    streamers = {
        name: Streamer(own_body(weights, network), weights, device, True, True) for name, weights in named.items()
    }
    finals = {}
    for i, (name, streamer) in enumerate(streamers.items()):
        finals[name] = run_blocks(streamer, batches, folder, f"compare{i}", advance)
    measured = {name: Measured() for name in named}
    vocabulary = output_width(network)
    for name, streamer in streamers.items():
        if name == "dense" and len(named) > 1:
            continue
        sums = Sums()
        with streamers["dense"].tail() as dense_tail, streamer.tail() as tail:
            for i, batch in enumerate(batches):
                dense_hidden, hidden = finals["dense"].read(i), finals[name].read(i)
                for start, stop in rows_at_once(batch, vocabulary):
                    part = batch.rows(start, stop)
                    dense = loss.target(dense_tail(part, dense_hidden[start:stop].to(device)), part)
                    other = dense if name == "dense" else loss.target(tail(part, hidden[start:stop].to(device)), part)
                    sums.add(loss, part, dense, other)
        measured[name], measured["dense"] = sums.measured(loss), sums.dense_measured(loss)
    for boundary in finals.values():
        boundary.remove()
    return measured


def body_of(weights: Weights, network: Network) -> Network:
    """The network whose blocks these weights fill: a plan may have taken some out, an artifact may arrange them."""
    if isinstance(weights, Artifact) and (weights.arrangement is not None or weights.depths is not None):
        module = build_on_meta(network.architecture, weights.config)
        checkpoint = replace(network.checkpoint, config=weights.config)
        return replace(network, checkpoint=checkpoint, module=module, tree=find_sites(module))
    return weights.network if isinstance(weights, Overlay) else network


def own_body(weights: Weights, network: Network) -> Network:
    """A network of its own for these weights to run in, which rounds inputs as they say."""
    return quantize_inputs(body_of(weights, network).again(), inputs_of(weights))


def _compare_whole(
    network: Network,
    variants: Mapping[str, Weights],
    loss: Loss,
    batches: Sequence[Batch],
    device: str,
    advance: Callable[[], None],
) -> dict[str, Measured]:
    """The same for a network that runs whole, against the module as it was given, before any batch norm was folded."""
    original = copy.deepcopy(network.original).to(device)  # type: ignore[attr-defined]
    dense = [loss.target(original(batch.pixels.to(device)), batch).cpu() for batch in batches]  # type: ignore[union-attr]
    advance()
    measured: dict[str, Measured] = {}
    for name, weights in (variants or {"dense": network}).items():
        sums = Sums()
        with running(quantize_inputs(network.again(), inputs_of(weights)), weights, device) as run:
            for batch, target in zip(batches, dense, strict=True):
                output = run(batch.pixels.to(device)) if name != "dense" else target  # type: ignore[union-attr]
                sums.add(loss, batch, target, loss.target(output, batch).cpu())
        measured[name], measured["dense"] = sums.measured(loss), sums.dense_measured(loss)
        advance()
    return measured


def run_blocks(streamer: Streamer, batches: Sequence[Batch], folder: Path, prefix: str, advance: Callable[[], None]):  # type: ignore[no-untyped-def]
    """All blocks of one network; returns the boundary after the last, the others are removed on the way."""
    width = hidden_width(streamer.network)
    first, second = boundaries(folder, prefix, batches, width, 2)
    depths = streamer.network.depths
    if depths is not None and depths.of_texts:
        run_whole(streamer, batches, first)
        advance()
        second.remove()
        return first
    enter_network(streamer, batches, first)
    for index in range(streamer.count):
        forward_block(streamer, index, batches, first, second)
        first, second = second, first
        advance()
    second.remove()
    return first


def run_whole(streamer: Streamer, batches: Sequence[Batch], last: Boundary) -> None:
    """The hidden states behind the last block of a network whose texts leave early, held in memory as it runs."""
    module = streamer.network.module
    found: list[Tensor] = []
    owners = parameter_owners(module).values()
    values = {name: streamer.weights.read(names[0]).to(streamer.device) for names in owners for name in names[:1]}
    values |= {name: values[names[0]] for names in owners for name in names[1:]}
    with materialised(module, values) as network:
        handle = network.get_submodule(streamer.network.tree.blocks[-1]).register_forward_hook(
            lambda _, __, out: found.append(out[0] if isinstance(out, tuple) else out)
        )

        def states() -> Iterator[Tensor]:
            for batch in batches:
                network(**streamer.arguments(batch))
                yield found.pop()

        try:
            last.write(states())
        finally:
            handle.remove()


@dataclass
class Sums:
    """Running sums of the loss, and of the log-likelihood of the next token under both networks."""

    loss: float = 0.0
    terms: int = 0
    likelihood: float = 0.0
    dense_likelihood: float = 0.0
    predicted: int = 0
    agreed: int = 0
    labelled: int = 0
    right: int = 0
    dense_right: int = 0
    vectors: list[Tensor] = field(default_factory=list)
    dense_vectors: list[Tensor] = field(default_factory=list)

    def add(self, loss: Loss, batch: Batch, dense: Tensor, other: Tensor) -> None:
        self.loss += float(loss.distances(dense, other).double().sum())
        self.terms += loss.terms(batch)
        if loss.kind == "distance":
            self.vectors.append(other.cpu())
            self.dense_vectors.append(dense.cpu())
            return
        self.agreed += int((dense.argmax(-1) == other.argmax(-1)).sum())
        if batch.labels is not None:
            labels = batch.labels.to(other.device)
            self.labelled += len(labels)
            self.right += int((other.argmax(-1) == labels).sum())
            self.dense_right += int((dense.argmax(-1) == labels).sum())
        if loss.causal and batch.mask is None:
            sequences, length = batch.tokens.shape
            follows = batch.tokens.roll(-1, 1).reshape(-1, 1).to(other.device)
            keep = (torch.arange(sequences * length) % length != length - 1).to(other.device)
            for logits, attribute in ((other, "likelihood"), (dense, "dense_likelihood")):
                parts = list(few_rows(logits))
                after = follows.split(len(parts[0]))
                scores = torch.cat([p.log_softmax(-1).gather(1, f) for p, f in zip(parts, after, strict=True)])[keep]
                setattr(self, attribute, getattr(self, attribute) + float(scores.double().sum()))
            self.predicted += int(keep.sum())

    def measured(self, loss: Loss) -> Measured:
        metrics = {
            loss.name: max(self.loss / max(1, self.terms), 0.0)
        }  # a KL of nothing may round below zero; nan stays
        if loss.kind != "distance":
            metrics["agreement"] = self.agreed / max(1, self.terms)
        if self.labelled:
            metrics["top1"] = self.right / self.labelled
        if self.predicted:
            metrics["perplexity"] = math.exp(-self.likelihood / self.predicted)
        return Measured(metrics, self.terms, torch.cat(self.vectors) if self.vectors else None)

    def dense_measured(self, loss: Loss) -> Measured:
        metrics = {loss.name: 0.0}
        if loss.kind != "distance":
            metrics["agreement"] = 1.0
        if self.labelled:
            metrics["top1"] = self.dense_right / self.labelled
        if self.predicted:
            metrics["perplexity"] = math.exp(-self.dense_likelihood / self.predicted)
        return Measured(metrics, self.terms, torch.cat(self.dense_vectors) if self.dense_vectors else None)
