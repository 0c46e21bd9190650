"""The measured loss of changing one site alone, to hold predictions against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from layerwise.encoding.encoded import Encoded
from layerwise.evaluate.compare import compare
from layerwise.loss import Loss
from layerwise.network.network import Network, output_width
from layerwise.network.overlay import Fetch, Overlay
from layerwise.network.sites import Site
from layerwise.network.streaming import Batch, Streamer, Weights, rows_at_once


@torch.inference_mode()
def measure_sites(
    network: Network,
    changes: Sequence[tuple[str, Encoded]],
    loss: Loss,
    batches: Sequence[Batch],
    device: str = "cpu",
    states: Callable[[int], list[Tensor]] | None = None,
) -> list[float]:
    """Mean loss per term with one site at a time replaced by its stored form and all else dense.

    states: boundary -> the dense hidden states of ``batches`` there, where a calibration has them on disk. Otherwise
            they are computed and held in memory (blocks x tokens x width x 4 bytes): give it a few thousand tokens.

    Only the blocks from the changed site on are run again.
    """
    return measure_changes(network, one_at_a_time(changes), loss, batches, device, states)


@torch.inference_mode()
def measure_changes(
    network: Network,
    changes: Sequence[Mapping[str, Fetch]],
    loss: Loss,
    batches: Sequence[Batch],
    device: str = "cpu",
    states: Callable[[int], list[Tensor]] | None = None,
) -> list[float]:
    """As ``measure_sites``, with several sites changed at a time: each change is site -> its stored form, fetched."""
    if network.whole:
        return [_measure_whole(network, change, loss, batches, device) for change in changes]
    own = network.again()  # one module for all: they are run one after another
    dense = Streamer(own, None, device, parts=True)
    states = states or dense_states(dense, batches).__getitem__
    targets = _targets(dense, loss, batches, states(len(network.parts)))
    return [_measure(own, change, loss, batches, states, targets, device) for change in changes]


def one_at_a_time(changes: Sequence[tuple[str, Encoded]]) -> list[Mapping[str, Fetch]]:
    """Each stored form as a change of its own."""
    return [{name: lambda encoded=encoded: encoded} for name, encoded in changes]  # type: ignore[misc]


def dense_states(dense: Streamer, batches: Sequence[Batch]) -> list[list[Tensor]]:
    """The hidden states of every batch at every boundary."""
    with dense.head_of_network() as enter:
        hidden = [[enter(batch, 0)[0] for batch in batches]]
    for index in range(dense.count):
        hidden.append(_block(dense, index, batches, hidden[index]))
    return hidden


def _measure(
    network: Network,
    change: Mapping[str, Fetch],
    loss: Loss,
    batches: Sequence[Batch],
    states: Callable[[int], list[Tensor]],
    targets: list[Tensor],
    device: str,
) -> float:
    sites = [network.tree.find(name) for name in change]
    weights = Overlay(network, change, exact=True)
    changed = changed_outputs(network, weights, sites, loss, batches, states, device)
    total = sum(float(loss.distances(a, b).double().sum()) for a, b in zip(targets, changed, strict=True))
    return max(0.0, total / sum(loss.terms(b) for b in batches))


def changed_outputs(
    network: Network,
    weights: Weights,
    sites: Sequence[Site],
    loss: Loss,
    batches: Sequence[Batch],
    states: Callable[[int], list[Tensor]],
    device: str = "cpu",
) -> list[Tensor]:
    """What the loss compares, a tensor a batch, of a network whose ``weights`` differ at ``sites`` alone.

    states: boundary -> the dense hidden states there; it is run from the first part that differs on.
    """
    streamer = Streamer(network, weights, device, parts=True)
    entering = any(site.kind in ("table", "position") for site in sites)
    parts = [network.part_of(site.block) for site in sites if site.block is not None]
    first = 0 if entering else min(parts, default=streamer.count)
    state = states(first)
    if entering:
        with streamer.head_of_network() as enter:
            state = [enter(batch, 0)[0] for batch in batches]
    for index in range(first, streamer.count):
        state = _block(streamer, index, batches, state)
    return _targets(streamer, loss, batches, state)


def _measure_whole(
    network: Network, change: Mapping[str, Fetch], loss: Loss, batches: Sequence[Batch], device: str
) -> float:
    found = compare(network, {"changed": Overlay(network, change, exact=True)}, loss, batches, Path(), device)
    return found["changed"].metrics[loss.name]


def _block(streamer: Streamer, index: int, batches: Sequence[Batch], state: list[Tensor]) -> list[Tensor]:
    with streamer.block(index) as block, streamer.head_of_network() as enter:
        if streamer.tuple_length is None:
            streamer.run_block(block, state[0][:1], enter(batches[0].rows(0, 1), 0)[1])
        return [
            streamer.run_block(block, given, enter(batch, index)[1])
            for batch, given in zip(batches, state, strict=True)
        ]


def _targets(streamer: Streamer, loss: Loss, batches: Sequence[Batch], state: list[Tensor]) -> list[Tensor]:
    width = output_width(streamer.network)
    out: list[Tensor] = []
    with streamer.tail() as leave:
        for batch, given in zip(batches, state, strict=True):
            parts = [
                loss.target(leave(part, given[start:stop]), part)
                for start, stop in rows_at_once(batch, width)
                for part in [batch.rows(start, stop)]
            ]
            out.append(torch.cat(parts))
    return out


def single_site_changes(kept: Mapping[str, Mapping[str, object]], count: int) -> list[tuple[str, str]]:
    """``count`` (site, recipe) pairs spread evenly over sites and recipes, in a fixed order."""
    pairs = [(site, recipe) for site in kept for recipe in kept[site] if not recipe.startswith("dense")]
    if len(pairs) <= count:
        return pairs
    step = len(pairs) / count
    return [pairs[int(i * step)] for i in range(count)]
