"""The act *move matrices*: how steep the loss is in each matrix, by two runs of the network and no derivative.

    c_l = mean over draws and sequences of |L(W_l + eps z) - L(W_l - eps z)| / (2 eps),     z ~ N(0, I) of W_l's shape

For a small ``eps`` the quotient is ``z . g``, g the gradient of a sequence's loss, so ``c_l`` estimates
``sqrt(2 / pi)`` times the mean length of the sequences' gradients. Each draw has sequences of its own.

The loss compares the network with itself, so its gradient at the dense network is zero; as everywhere in this package
labels are drawn from the network's own distribution, and L is minus their log-likelihood to first order in the output,
divided by the terms of the sequence. Matrices are moved in float32 beside the stored ones, which are never written.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from layerwise.calibrate.passes import Calibration
from layerwise.evaluate.sites import changed_outputs
from layerwise.loss import Loss
from layerwise.network.module import running
from layerwise.network.network import Network
from layerwise.network.overlay import Overlay
from layerwise.network.sites import Site
from layerwise.network.streaming import Batch

SEQUENCES = 8  # of a draw

Outputs = Callable[[Network | Overlay, Site | None], Tensor]


@torch.inference_mode()
def measure_slopes(
    calibration: Calibration, sites: Sequence[Site], draws: int, size: float, advance: Callable[[], None]
) -> dict[str, float]:
    """Site -> c_l; ``size`` is eps."""
    network, loss = calibration.network, calibration.loss
    total = dict.fromkeys((site.name for site in sites), 0.0)
    parts = [drawn(calibration, draw) for draw in range(draws)]
    dense = [run(network, None) for _, run in parts]
    directions = [
        loss.direction(output.cpu(), torch.Generator().manual_seed(calibration.seed * 1_000_003 + draw)).double()
        for draw, output in enumerate(dense)
    ]
    for site in sites:
        weight = network.read(site.parameter)
        for draw, (batch, run) in enumerate(parts):
            seed = zlib.crc32(site.name.encode()) + draw + calibration.seed * 1_000_003
            move = size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            ends = [
                run(Overlay(network, {}, {site.parameter: moved}, exact=True), site)
                for moved in (weight + move, weight - move)
            ]
            rises = -((ends[0].cpu().double() - ends[1].cpu().double()) * directions[draw]).sum(-1) / (2 * size)
            total[site.name] += float(of_sequences(rises, loss, batch).abs().mean()) / draws
        advance()
    return total


def of_sequences(terms: Tensor, loss: Loss, batch: Batch) -> Tensor:
    """Mean over the terms of each sequence, [sequences]."""
    if loss.kind != "token kl":
        return terms
    counted = batch.counted
    owner = counted.nonzero()[:, 0]
    sums = torch.zeros(len(counted), dtype=terms.dtype).index_add_(0, owner, terms)
    return sums / counted.sum(1).clamp(min=1)


def drawn(calibration: Calibration, draw: int) -> tuple[Batch, Outputs]:
    """The sequences of a draw, and what the loss compares on them under given weights that differ at a site."""
    network, loss, device = calibration.network, calibration.loss, calibration.device
    places = [
        (index, start)
        for index, batch in enumerate(calibration.splits.fit)
        for start in range(0, len(batch.tokens), SEQUENCES)
    ]
    index, start = places[draw % len(places)]
    batch = calibration.splits.fit[index].rows(start, start + SEQUENCES)
    if network.whole:

        def run_whole(weights: Network | Overlay, _: Site | None) -> Tensor:
            with running(network.again(), weights, device) as run:
                return loss.target(run(batch.pixels.to(device)), batch)  # type: ignore[union-attr]

        return batch, run_whole
    inputs, own = calibration.inputs(), network.again()

    def run_blocks(weights: Network | Overlay, site: Site | None) -> Tensor:
        def states(boundary: int) -> list[Tensor]:
            return [inputs[boundary].read(index)[start : start + SEQUENCES]]

        sites = [site] if site is not None else []
        return changed_outputs(own, weights, sites, loss, [batch], states, device)[0]

    return batch, run_blocks
