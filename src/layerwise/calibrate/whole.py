"""The passes over a network that runs whole: one forward and the sampled gradients through the entire module.

The same statistics as block by block, gathered at all sites at once; nothing waits on disk. The only unit is the tail.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from layerwise.calibrate.observer import observing
from layerwise.calibrate.passes import TAIL, Calibration, Part, fitted_sites
from layerwise.calibrate.reverse import DRAWS, SplitMoments, add_inputs, back_propagate, unreached_sites
from layerwise.calibrate.statistics import Wanted
from layerwise.network.module import running


def reverse_whole(calibration: Calibration, finished: Collection[str], uniform: bool = False) -> Iterator[Part]:
    """Yield the one unit, unless it is finished. With ``uniform`` all inputs fit and judge alike."""
    if TAIL in finished:
        return
    network, splits, loss = calibration.network, calibration.splits, calibration.loss
    batches = splits.all if uniform else (*splits.fit, *splits.judge)
    split_of = ["fit"] * len(batches) if uniform else ["fit"] * len(splits.fit) + ["judge"] * len(splits.judge)
    names = [s.name for s in network.tree.sites]
    whole = frozenset(names) if calibration.whole_inputs else frozenset()
    found = {split: SplitMoments(whole, wanted=calibration.wanted) for split in dict.fromkeys(split_of)}
    with (
        running(network, device=calibration.device) as run,
        observing(network.module, dict(zip(names, names, strict=True)), apart=True) as observer,
    ):
        for i, batch in enumerate(batches):
            assert batch.pixels is not None
            generator = torch.Generator().manual_seed(calibration.seed * 1_000_003 + i)
            moments = found[split_of[i]]
            moments.terms += loss.terms(batch)
            with torch.enable_grad():
                pixels = batch.pixels.to(calibration.device).clone().requires_grad_()
                target = loss.target(run(pixels), batch)
            add_inputs(moments, observer.seen, batch)
            directions = torch.stack([loss.direction(target, generator) for _ in range(DRAWS)])
            back_propagate(target, pixels, observer.seen, directions, moments, batch, False)
            observer.seen.clear()
    lost = unreached_sites(found, names)
    yield Part(TAIL, fitted_sites(found, [n for n in names if n not in lost], loss), frozenset(lost))


@torch.inference_mode()
def watch_whole(calibration: Calibration) -> SplitMoments:
    """Second moments of every site's inputs over all batches, without gradients."""
    names = [s.name for s in calibration.network.tree.sites]
    moments = SplitMoments(frozenset(names), wanted=Wanted(largest=calibration.wanted.largest))
    with (
        running(calibration.network, device=calibration.device) as run,
        observing(calibration.network.module, dict(zip(names, names, strict=True)), apart=True) as observer,
    ):
        for batch in calibration.splits.all:
            assert batch.pixels is not None
            run(batch.pixels.to(calibration.device).clone())
            add_inputs(moments, observer.seen, batch)
            observer.seen.clear()
    return moments
