"""*Tune* with network scope: the whole stored network in memory, against the dense network by the network's own loss.

    tokens ─→ stored network, every block's linears as the tuner's function of what it learns ─→ output
    dense block boundary on disk ─→ dense tail ──────────────────────────────────────────────→ target

The dense network is not run again: its last hidden states lie in the work folder since the forward pass. In memory are
the stored network decoded, what the tuner learns of it, and the activations of one part. Tables, heads, norms and
biases stay as they are stored. The journal's unit is the whole tuning: a run that was killed on the way tunes anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from layerwise.acts.kept import rebuilt
from layerwise.acts.tuned_forms import TunedForms, parts_of
from layerwise.calibrate.forward import learn_output_shape
from layerwise.network.overlay import Overlay
from layerwise.network.skeleton import materialised, parameter_owners
from layerwise.network.streaming import Batch, Streamer
from layerwise.tune.network import TunedNetwork
from layerwise.tune.scope import Tuned

UNIT = "network"


def tune_network(forms: TunedForms, batches: tuple[Batch, ...], stepped: Callable[[], None]) -> Tuned:
    """What the tuner changes, by site."""
    calibration, tuner, loss = forms.calibration, forms.tuner, forms.calibration.loss
    made = rebuilt(forms.candidates, forms.recipes)
    sites = dict(zip(forms.stored, made.encoded, strict=True))  # in the dense network -> in what the plan made of it
    touched = {
        site: form
        for site in map(calibration.network.tree.find, sites)
        if site.block is not None and tuner.touches(form := forms.stored[site.name]())
    }
    dense = Streamer(calibration.network, device=calibration.device)
    hidden = calibration.inputs(batches)
    learn_output_shape(dense, batches[0], hidden[0])
    network, parts = made.network.again(), parts_of(batches, tuner.sequences)
    weights = Overlay(network, made.encoded, made.plain)
    values: dict[str, Tensor] = {}
    for first, *others in parameter_owners(network.module).values():
        values[first] = weights.read(first).to(dense.device)
        values |= dict.fromkeys(others, values[first])

    def batch_of(part: int) -> Batch:
        batch, rows = parts[part]
        return batches[batch].rows(rows.start, rows.stop)

    with materialised(network.module, values) as module, dense.tail() as tail:
        module.to(dense.device)

        def forward(given: Mapping[str, Tensor], part: int) -> Tensor:
            batch, find = batch_of(part), calibration.network.tree.find
            named = {f"{sites[name]}.weight": find(name).as_kept(w).to(dense.device) for name, w in given.items()}
            return loss.target(torch.func.functional_call(module, named, (), dense.arguments(batch)), batch)

        @torch.no_grad()
        def target(part: int) -> Tensor:
            batch, rows = parts[part]
            return loss.target(tail(batch_of(part), hidden[-1].read(batch)[rows].to(dense.device)), batch_of(part))

        scope = TunedNetwork(
            {site.name: form for site, form in touched.items()}, forms.dense_weights(calibration.network, touched),
            len(parts), forward, target, loss.distances, stepped, calibration.seed * 1_000_003 + len(hidden),
        )  # fmt: skip
        return tuner.tune(scope)
