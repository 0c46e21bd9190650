"""Input statistics alone, from one forward pass over stored block inputs: all that plain baselines need.

Every calibration token counts, whatever its split; gradients are taken as alike in every direction.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from layerwise.calibrate.activations import Boundary
from layerwise.calibrate.experts import with_average
from layerwise.calibrate.forward import learn_output_shape
from layerwise.calibrate.moments import shrunk
from layerwise.calibrate.observer import observing
from layerwise.calibrate.passes import TABLES, TAIL, Calibration, Fitted, Part
from layerwise.calibrate.reverse import DRAWS, SplitMoments, add_inputs, reverse_tail, unreached_sites
from layerwise.calibrate.statistics import SiteStatistics, Use, Wanted
from layerwise.calibrate.whole import watch_whole
from layerwise.network.network import output_width
from layerwise.network.sites import Site
from layerwise.network.streaming import Streamer, rows_at_once


def input_parts(calibration: Calibration, finished: Collection[str], apart: bool = False) -> Iterator[Part]:
    """Every unit that is not finished, with ``H`` of its sites; in the order of the reverse pass.

    apart: name the sites after the blocks that the loss does not reach, instead of measuring them.
    """
    network = calibration.network
    if network.whole:
        if TAIL not in finished:
            moments = watch_whole(calibration)
            yield Part(TAIL, {s.name: _alike(s, moments) for s in network.tree.sites}, frozenset())
        return
    streamer = Streamer(network, device=calibration.device, parts=True)
    for unit in calibration.units():
        if unit in finished:
            continue
        if unit == TABLES:
            sites = [s for s in network.tree.sites if s.kind == "table"]
        else:
            blocks = [None] if unit == TAIL else network.parts[_part(calibration, unit)]
            sites = [s for b in blocks for s in network.tree.of_block(b) if s.kind in ("linear", "head")]
        wanted = Wanted(largest=calibration.wanted.largest)
        moments = SplitMoments(frozenset(s.name for s in sites), wanted=wanted)
        if unit != TABLES:
            _watch(calibration, streamer, unit, sites, moments)
        lost = lost_in_tail(calibration, streamer, sites) if unit == TAIL and apart else frozenset()
        reached = [s for s in sites if s.name not in lost]
        yield Part(unit, _experts_filled({s.name: _alike(s, moments) for s in reached}, reached), lost)


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


@torch.inference_mode()
def _watch(calibration: Calibration, streamer: Streamer, unit: str, sites: list[Site], moments: SplitMoments) -> None:
    network, batches, inputs = calibration.network, calibration.splits.all, calibration.inputs()
    if unit == TAIL:
        width = output_width(network)
        with streamer.tail() as leave, observing(network.module, {s.name: s.name for s in sites}) as observer:
            for i, batch in enumerate(batches):
                stored = inputs[-1].read(i)
                for start, stop in rows_at_once(batch, width):
                    part = batch.rows(start, stop)
                    leave(part, stored[start:stop].to(streamer.device))
                    add_inputs(moments, observer.seen, part)
                    observer.seen.clear()
        return
    index = _part(calibration, unit)
    names, uses = {s.name: s.name for s in sites}, network.arrangement is not None
    learn_output_shape(streamer, batches[0], inputs[0])
    with (
        streamer.block(index) as block,
        streamer.head_of_network() as enter,
        observing(network.module, names, uses=uses) as observer,
    ):
        for i, batch in enumerate(batches):
            streamer.run_block(block, inputs[index].read(i).to(streamer.device), enter(batch, index)[1])
            add_inputs(moments, observer.seen, batch, observer.routed)
            observer.clear()


def _part(calibration: Calibration, unit: str) -> int:
    """Which part a unit between tail and tables is."""
    units = calibration.units()
    return len(units) - 2 - units.index(unit)


def _alike(site: Site, moments: SplitMoments) -> Fitted:
    """Statistics with the measured inputs, and rows that all weigh the same."""
    watched = moments.sites.get(site.name)
    if watched is None or not watched.inputs.count:
        statistics = SiteStatistics.uninformed(site.rows, site.columns)
        return Fitted(statistics, statistics)
    use = Use(
        rows=torch.ones(site.rows),
        columns=(inputs := shrunk(watched.inputs.mean(), watched.inputs.count)),
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
