"""What ``layerwise bench`` measures of a surgeon of the whole network.

Every setting of its menu is carried out on the calibrated network and stored in 16 bits, then held by the loss against

- each of its ``rivals`` that makes a network of about the same bytes, such as the surgeon itself with its idea taken
  out; without any, the network as it came;
- round to nearest, planned within the same bytes, where the result is smaller than the network as it came: what the
  bytes are worth to quantization.

One that gives each text a depth of its own (``by_text``) is measured on a classifier: ``trials/text_depths.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from layerwise.acts.apply import predicted_bytes
from layerwise.acts.removal import measure_removals
from layerwise.errors import InputError
from layerwise.evaluate.compare import compare
from layerwise.network.network import Network
from layerwise.network.overlay import Overlay
from layerwise.network.reblocked import reblocked
from layerwise.recipe import parse_surgeon
from layerwise.roles import NetworkSurgeon, Surgeon
from layerwise.trials.by_loss import Figures, Ground, Side, Trial, floor_menu, planned_floor
from layerwise.trials.text_depths import text_depth_trials


def network_surgeon_trials(ground: Ground, technique: str) -> list[Trial]:
    """Every setting against its rivals, and against round to nearest in as many bytes."""
    name, _, options = technique.partition(":")
    asked = parse_surgeon(technique)
    assert isinstance(asked, NetworkSurgeon)
    if asked.by_text:
        return text_depth_trials(ground, technique)
    settings = [technique] if options else [f"{name}:{setting}" for setting in asked.menu]
    dense = Side("the network as it came", predicted_bytes(ground.network, {}), Overlay(ground.network, {}))
    sides = {text: operated(ground, text) for text in dict.fromkeys([*settings, *asked.rivals])}
    smaller = [setting for setting in settings if sides[setting].bytes < dense.bytes]
    if asked.judged_by:
        return judged(ground, asked.judged_by, dense, sides, settings, asked.rivals)
    found = ground.search(floor_menu()) if smaller else None
    trials = []
    for setting in settings:
        alike = [rival for rival in asked.rivals if rival != setting and of_one_size(sides[setting], sides[rival])]
        trials += [Trial(sides[setting], sides[rival]) for rival in alike]
        if not asked.rivals:
            trials.append(Trial(sides[setting], dense))
        if found is not None and setting in smaller:
            trials.append(Trial(sides[setting], planned_floor(ground, found, sides[setting].bytes)))
    return trials


def of_one_size(one: Side, other: Side) -> bool:
    """Whether two networks are within a fiftieth of each other in bytes."""
    return abs(one.bytes - other.bytes) * 50 <= max(one.bytes, other.bytes)


def judged(
    ground: Ground, metric: str, dense: Side, sides: dict[str, Side], settings: Sequence[str], rivals: Sequence[str]
) -> list[Trial]:
    """By another figure than the loss against the network as it came, which is one of the rivals then."""
    prepared, weights = ground.prepared, {name: s.weights for name, s in sides.items() if s.weights is not None}
    found = compare(
        ground.network, weights, prepared.loss, prepared.evaluation.batches, ground.calibration.folder,
        prepared.options.device,
    )  # fmt: skip
    if metric not in found["dense"].metrics:
        raise InputError(f"the evidence is in {metric}, which {ground.network.name} has none of")
    value = {name: found[name].metrics[metric] for name in sides} | {dense.recipe: found["dense"].metrics[metric]}
    return [
        Trial(sides[setting], other, Figures(metric, value[setting], value[other.recipe]))
        for setting in settings
        for other in (dense, *(sides[rival] for rival in rivals if rival != setting))
    ]


def operated(ground: Ground, text: str) -> Side:
    """The network of one setting, in 16 bits."""
    surgeon = parse_surgeon(text)
    if getattr(surgeon, "seed", None) == 0:
        surgeon = replace(surgeon, seed=ground.prepared.options.seed)  # type: ignore[type-var]
    made = network_of(ground, surgeon)
    return Side(text, predicted_bytes(made, {}), Overlay(made, {}))


def network_of(ground: Ground, surgeon: Surgeon | NetworkSurgeon) -> Network:
    if isinstance(surgeon, Surgeon):
        return reblocked(ground.network, surgeon.order(measure_removals(ground.calibration)))
    return surgeon.operate(ground.network, ground.calibration, ground.watch)
