"""Input statistics alone, from the forward pass itself: all that a uniform setting without gradients needs.

Each block runs once: what it hands on goes to disk unless it is there already, and its linears' inputs are summed on
the way. Of what follows the blocks only as much runs as has linears; the product with the vocabulary has no part in it.
Every calibration token counts, whatever its split; gradients are taken as alike in every direction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from layerwise.calibrate.activations import Boundary
from layerwise.calibrate.experts import with_average
from layerwise.calibrate.forward import learn_output_shape
from layerwise.calibrate.observer import observing
from layerwise.calibrate.passes import (
    TABLES,
    TAIL,
    Calibration,
    Fitted,
    Part,
    enter_first,
    note_reached,
    reached,
    unit_name,
)
from layerwise.calibrate.reverse import DRAWS, SplitMoments, add_inputs, reverse_tail, unreached_sites
from layerwise.calibrate.statistics import SiteStatistics, Use, Wanted
from layerwise.calibrate.whole import watch_whole
from layerwise.engine.memory import reused
from layerwise.network.network import output_width
from layerwise.network.sites import Site
from layerwise.network.streaming import Batch, Streamer, rows_at_once

TOKENS_AT_ONCE = 768  # a whole number of the 192 that a product over tokens sums at a time, so sums stay the same


def input_parts(calibration: Calibration, finished: Collection[str], apart: bool = False) -> Iterator[Part]:
    """Every unit that is not finished, with ``H`` of its sites, in the order of the forward pass.

    apart: name the sites after the blocks that the loss does not reach, instead of measuring them.
    """
    network = calibration.network
    if network.whole:
        if TAIL not in finished:
            moments = watch_whole(calibration)
            yield Part(TAIL, {s.name: _alike(s, moments) for s in network.tree.sites}, frozenset())
        return
    streamer = Streamer(network, device=calibration.device, parts=True)
    enter_first(calibration, streamer)
    for index, blocks in enumerate(network.parts):
        unit = unit_name(blocks)
        if unit not in finished or not reached(calibration, index + 1):
            sites = [s for block in blocks for s in network.tree.of_block(block) if s.kind == "linear"]
            moments = _moments(calibration, sites)
            _watch_block(calibration, streamer, index, moments)
            if unit not in finished:
                yield Part(unit, _experts_filled({s.name: _alike(s, moments) for s in sites}, sites), frozenset())
            del moments  # as large as the block's statistics: never two at a time
    if TAIL not in finished:
        sites = [s for s in network.tree.of_block(None) if s.kind in ("linear", "head")]
        lost = lost_in_tail(calibration, streamer, sites) if apart else frozenset()
        sites = [s for s in sites if s.name not in lost]
        moments = _moments(calibration, sites)
        if sites:
            _watch_tail(calibration, streamer, sites, moments)
        yield Part(TAIL, {s.name: _alike(s, moments) for s in sites}, lost)
    if TABLES not in finished:
        nothing = SplitMoments(frozenset())
        yield Part(TABLES, {s.name: _alike(s, nothing) for s in network.tree.sites if s.kind == "table"}, frozenset())


def reached_input_parts(calibration: Calibration, finished: Collection[str]) -> Iterator[Part]:
    """The same, with sites after the blocks that the loss does not depend on kept apart, as the reverse pass has it."""
    return input_parts(calibration, finished, apart=True)


def lost_in_tail(calibration: Calibration, streamer: Streamer, sites: list[Site]) -> frozenset[str]:
    """Linears after the blocks that get no gradient on the first batch, such as the pooler of a bare encoder."""
    names = [s.name for s in sites if s.kind == "linear"]
    if not names:
        return frozenset()
    batches, inputs = calibration.splits.all[:1], calibration.inputs(calibration.splits.all[:1])
    scratch = Boundary(calibration.folder / "reach.bin", [(DRAWS, *batches[0].tokens.shape, calibration.width)])
    found = reverse_tail(streamer, calibration.loss, batches, ["fit"], inputs[-1], scratch, calibration.seed)
    scratch.remove()
    return frozenset(unreached_sites(found, names))


def _moments(calibration: Calibration, sites: list[Site]) -> SplitMoments:
    return SplitMoments(frozenset(s.name for s in sites), wanted=Wanted(largest=calibration.wanted.largest))


@torch.inference_mode()
def _watch_block(calibration: Calibration, streamer: Streamer, index: int, moments: SplitMoments) -> None:
    """Run a block, or a part, on every batch; write what it hands on unless that is there."""
    network, batches, inputs = calibration.network, calibration.splits.all, calibration.inputs()
    names, uses = {name: name for name in moments.whole}, network.arrangement is not None
    learn_output_shape(streamer, batches[0], inputs[0])
    part = batches[0]

    def add() -> None:
        add_inputs(moments, observer.seen, part, observer.routed)
        observer.clear()

    with (
        reused(),
        streamer.block(index) as block,
        streamer.head_of_network() as enter,
        observing(network.module, names, uses=uses, full=add) as observer,
    ):

        def run() -> Iterator[Tensor]:
            nonlocal part
            for at, batch in enumerate(batches):
                hidden = inputs[index].read(at)
                for start, stop in pieces(batch):
                    part = batch.rows(start, stop)
                    call = enter(part, index)[1]
                    out = streamer.run_block(block, hidden[start:stop].to(streamer.device), call)
                    add()
                    hidden[start:stop] = out
                yield hidden

        if reached(calibration, index + 1):
            for _ in run():
                pass
            return
        inputs[index + 1].write(run())
    note_reached(calibration, index + 1)


def pieces(batch: Batch) -> Sequence[tuple[int, int]]:
    """Ranges of sequences of at most about ``TOKENS_AT_ONCE`` tokens; padded texts and images stay together.

    A quarter of the memory, and what one step leaves is in the cache for the next.
    """
    count, length = batch.tokens.shape
    whole = batch.mask is not None or batch.pixels is not None
    step = count if whole else max(1, TOKENS_AT_ONCE // length)
    return [(start, min(start + step, count)) for start in range(0, count, step)]


@torch.inference_mode()
def _watch_tail(calibration: Calibration, streamer: Streamer, sites: list[Site], moments: SplitMoments) -> None:
    """Run what comes after the blocks as far as the head, which is not multiplied with."""
    network, inputs = calibration.network, calibration.inputs()[-1]
    width = output_width(network)
    linears = {s.name: s.name for s in sites if s.kind == "linear"}
    head = next((s.name for s in sites if s.kind == "head"), None)
    learn_output_shape(streamer, calibration.splits.all[0], inputs)
    with (
        streamer.tail(with_head=head is None) as leave,
        observing(network.module, linears) as observer,
        stopped_before(network.module, head, observer.seen),
    ):
        for i, batch in enumerate(calibration.splits.all):
            stored = inputs.read(i)
            for start, stop in rows_at_once(batch, width):
                part = batch.rows(start, stop)
                with contextlib.suppress(_AtHead):
                    leave(part, stored[start:stop].to(streamer.device))
                add_inputs(moments, observer.seen, part)
                observer.seen.clear()


class _AtHead(Exception):
    """Leaves the network's forward where the head would begin."""


@contextlib.contextmanager
def stopped_before(module: nn.Module, head: str | None, seen: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Note what the head is given and raise ``_AtHead`` instead of running it; nothing without a head."""
    if head is None:
        yield
        return

    def stop(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen[head] = (given[0], given[0])  # in the place of its output, of which only gradients would be taken
        raise _AtHead

    handle = module.get_submodule(head).register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def _alike(site: Site, moments: SplitMoments) -> Fitted:
    """Statistics with the measured inputs, and rows that all weigh the same."""
    watched = moments.sites.get(site.name)
    if watched is None or not watched.inputs.count:
        statistics = SiteStatistics.uninformed(site.rows, site.columns)
        return Fitted(statistics, statistics)
    use = Use(
        rows=torch.ones(site.rows),
        columns=(inputs := watched.inputs.known()),
        inputs=inputs,
        absolute_mean=watched.inputs.absolute_mean(),
        scale=1.0,
        tokens=watched.inputs.count,
        largest=watched.inputs.largest,
    )
    return Fitted(SiteStatistics((use,)), SiteStatistics((use,)))


def _experts_filled(found: dict[str, Fitted], sites: list[Site]) -> dict[str, Fitted]:
    """Experts that got no token take the average of their layer's inputs."""
    experts = [s for s in sites if s.experts]
    measured = {s.name: found[s.name].fit for s in experts if found[s.name].fit.tokens}
    return found | {name: Fitted(one, one) for name, one in with_average(experts, measured).items()}
