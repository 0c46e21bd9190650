"""What ``layerwise bench`` measures of a technique that quantizes the inputs of linears.

Weights at 8 bits (round to nearest) and at 4 (two-sided), in groups of 64, multiply inputs at 8, 6 and 4 bits. Each
setting is held against the same weights with inputs in floats, against one static scale for the whole tensor, and
against one dynamic scale a token in as many bits. Static grids are measured on the calibration text, under the stored
weights; what they store is counted. The loss is held against the dense network, so that of float inputs is what the
weights alone cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from layerwise.acts.activations import input_grids
from layerwise.acts.apply import predicted_bytes
from layerwise.acts.kept import Rebuilt, rebuilt
from layerwise.recipe import parse_activations
from layerwise.roles import ActivationQuantizer
from layerwise.trials.by_loss import GROUP, Ground, Side, Trial, chosen_of

WEIGHTS = (f"rtn:bits=8,group={GROUP}", f"two_sided:bits=4,group={GROUP}")
INPUT_WIDTHS = (8, 6, 4)
STATIC = "dgq:bits={bits},groups=1"
DYNAMIC = "token_int:bits={bits}"


def activation_trials(ground: Ground, technique: str) -> list[Trial]:
    """Every setting with both weights, against floats and against the plain static and dynamic grids."""
    rivals = {str(setting): rivals_of(setting) for setting in input_settings(technique)}
    texts = dict.fromkeys([*rivals, *(text for others in rivals.values() for text in others)])
    found = ground.search(WEIGHTS)
    trials: list[Trial] = []
    for recipe in WEIGHTS:
        chosen = chosen_of(found, recipe)
        floats, made = ground.side(found, recipe, chosen), rebuilt(found, chosen)
        sides = {text: with_inputs(ground, floats, made, text) for text in texts}
        for setting, others in rivals.items():
            trials.append(Trial(sides[setting], floats))
            trials += [Trial(sides[setting], sides[other]) for other in others]
    return trials


def rivals_of(setting: ActivationQuantizer) -> list[str]:
    """The plain static and the plain dynamic grid of as many bits."""
    plain = [str(parse_activations(text.format(bits=getattr(setting, "bits", 8)))) for text in (STATIC, DYNAMIC)]
    return [text for text in plain if text != str(setting)]


def with_inputs(ground: Ground, floats: Side, made: Rebuilt, text: str) -> Side:
    """The same weights, multiplied by inputs on the grids of a setting."""
    quantizer, splits = parse_activations(text), ground.prepared.splits
    assert floats.weights is not None
    inputs = input_grids(floats.weights, made.recipes, quantizer, ground.calibration, (*splits.fit, *splits.judge))
    size = predicted_bytes(made.network, made.recipes, quantizer)
    return Side(f"{floats.recipe}, inputs {text}", size, floats.weights.giving(inputs))


def input_settings(technique: str) -> Sequence[ActivationQuantizer]:
    """What was asked for, the technique's own menu, or 8, 6 and 4 bits."""
    quantizer = parse_activations(technique)
    if ":" in technique:
        return [quantizer]
    if quantizer.menu:
        return [parse_activations(f"{technique}:{setting}") for setting in quantizer.menu]
    if "bits" not in {f.name for f in fields(quantizer)}:  # type: ignore[arg-type]
        return [quantizer]
    return [replace(quantizer, bits=bits) for bits in INPUT_WIDTHS]  # type: ignore[type-var, call-arg]
