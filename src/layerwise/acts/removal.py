"""The act *measure removals*: what the loss rises by when a block is taken out, one block at a time.

No curvature predicts the removal of a block, so it is measured: on tokens of the judge split the network runs once
from each block's input on with that block skipped. All these runs share one pass, so that a block is read once. Single
sites are measured beside it, and the median of measured over predicted puts both kinds of figures on one scale.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn.functional import cosine_similarity

from layerwise.acts.kept import Candidates
from layerwise.acts.rewriting import AS_IS
from layerwise.calibrate.activations import Boundary
from layerwise.calibrate.forward import boundaries, learn_output_shape
from layerwise.calibrate.passes import Calibration
from layerwise.calibrate.splits import first_tokens
from layerwise.encoding.encoded import Encoded
from layerwise.engine.progress import Progress
from layerwise.evaluate.sites import measure_changes, one_at_a_time, single_site_changes
from layerwise.loss import Loss
from layerwise.network.network import output_width
from layerwise.network.overlay import Fetch
from layerwise.network.streaming import Batch, Streamer, rows_at_once
from layerwise.roles import BlockMeasure

TOKENS = 4096  # that blocks are measured on
SCALE_SITES = 10
STEER_TOKENS = 2048  # that single sites are measured on
MOST_SCORES = 1 << 24  # values of the outputs held at a time, two sets of them


def find_removals(calibration: Calibration, candidates: Candidates, stage: str, progress: Progress) -> None:
    """Measure every block and journal it, with the scale that turns a measured rise into a predicted one."""
    unit = f"{stage}/removals"
    if calibration.journal.has(unit):
        return
    with progress.stage("measure removals", len(calibration.network.tree.blocks)) as advance:
        measures = measure_removals(calibration, advance)
        calibration.journal.record(
            unit,
            {
                "scale": scale(calibration, candidates),
                "blocks": [{"damage": m.damage, "influence": m.influence} for m in measures],
            },
        )


@torch.inference_mode()
def measure_removals(calibration: Calibration, advance: Callable[[], None] = lambda: None) -> list[BlockMeasure]:
    """Rise of the loss without each block, and each block's influence, on the first tokens of the judge split."""
    splits, network, loss = calibration.splits, calibration.network, calibration.loss
    batches = first_tokens(splits.judge, TOKENS)
    offset, count = len(splits.fit), len(network.tree.blocks)
    hidden = calibration.inputs()
    streamer = Streamer(network, device=calibration.device)
    learn_output_shape(streamer, splits.all[0], hidden[0])
    states: list[tuple[Boundary, Boundary]] = []
    influence: list[float] = []
    for index in range(count):
        with streamer.block(index) as block, streamer.head_of_network() as enter:
            calls = [enter(batch, index)[1] for batch in batches]
            for i, (now, then) in enumerate(states):
                then.write(
                    streamer.run_block(block, now.read(k).to(streamer.device), call) for k, call in enumerate(calls)
                )
                states[i] = (then, now)
        first, second = boundaries(calibration.folder, f"removal{index}", batches, calibration.width, 2)
        first.write(hidden[index].read(offset + k) for k in range(len(batches)))
        states.append((first, second))
        influence.append(block_influence(hidden[index], hidden[index + 1], batches, offset))
        advance()
    damages = [
        rise(streamer, loss, batches, hidden[count], offset, state, output_width(network)) for state, _ in states
    ]
    for pair in states:
        for boundary in pair:
            boundary.remove()
    return [BlockMeasure(d, i) for d, i in zip(damages, influence, strict=True)]


def rise(
    streamer: Streamer, loss: Loss, batches: Sequence[Batch], dense: Boundary, offset: int, other: Boundary, width: int
) -> float:
    """Mean loss per term between the dense network's last hidden states and those of another run."""
    total, terms = 0.0, 0
    with streamer.tail() as leave:
        for k, batch in enumerate(batches):
            kept, changed = dense.read(offset + k).to(streamer.device), other.read(k).to(streamer.device)
            for start, stop in rows_at_once(batch, width):
                part = batch.rows(start, stop)
                targets = [loss.target(leave(part, h[start:stop]), part) for h in (kept, changed)]
                total += float(loss.distances(*targets).double().sum())
                terms += loss.terms(part)
    return max(total / max(1, terms), 0.0)  # in this order, not a number stays not a number


def block_influence(before: Boundary, after: Boundary, batches: Sequence[Batch], offset: int) -> float:
    """``1 - mean cos(h, block(h))`` over tokens; padding never counts."""
    total, tokens = 0.0, 0
    for k, batch in enumerate(batches):
        cosine = cosine_similarity(before.read(offset + k), after.read(offset + k), dim=-1)[batch.counted]
        total += float((1 - cosine.double()).sum())
        tokens += len(cosine)
    return total / max(1, tokens)


def scale(calibration: Calibration, candidates: Candidates) -> float:
    """Median of measured over predicted damage of single sites; 1 where nothing can be compared."""
    kept = {
        name: {c.recipe: c.damage for c in found.of(AS_IS) if c.damage > 0}
        for name, found in candidates.sites.items()
        if found.reached
    }
    pairs = single_site_changes(kept, SCALE_SITES)
    changes = [(site, candidates.sites[site].fetch(recipe)) for site, recipe in pairs]
    if not changes:
        return 1.0
    measured = measure_on_steer(calibration, changes)
    found = statistics.median(m / kept[site][recipe] for (site, recipe), m in zip(pairs, measured, strict=True))
    return found if found > 0 else 1.0


def measure_on_steer(calibration: Calibration, changes: Sequence[tuple[str, Encoded]]) -> list[float]:
    """Mean loss per term with one site at a time in its stored form, on the first tokens of the steer split."""
    return changed_on_steer(calibration, one_at_a_time(changes))


def changed_on_steer(calibration: Calibration, changes: Sequence[Mapping[str, Fetch]]) -> list[float]:
    """The same with the sites of each change stored together; site -> a function that fetches its stored form."""
    splits, network = calibration.splits, calibration.network
    if network.whole:
        return measure_changes(
            network, changes, calibration.loss, first_tokens(splits.steer, STEER_TOKENS), calibration.device
        )
    tokens = min(STEER_TOKENS, max(64, MOST_SCORES // output_width(network)))
    batches = first_tokens(splits.steer, tokens)
    before = len(splits.fit) + len(splits.judge)
    states = calibration.states(before, len(batches))
    return measure_changes(network, changes, calibration.loss, batches, calibration.device, states)
