"""The act *tune* (``--tune``): with the plan fixed, improve stored values against the dense network.

    stored, tuned prefix ─→ x' ─→ block i ─ tuner: stored form of block i against the dense block's output ─→ x' …
    dense network        ─→ x  ─→ block i ─→ y

Blocks are taken in order of execution, one in memory; a tuner of network scope is given all of them at once
(``network_tuning.py``). A tuner sees the calibration tokens, what goes into the block
(what arrives behind the stored blocks before it, or the dense network's own inputs, as it declares), what the dense
block gave in the dense network, and the stored forms that the plan chose; it returns other values in the same forms.
Sizes cannot change; the plan's damages are those before tuning. Journaled by block: a run that was killed goes on with
the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from layerwise.acts.kept import Candidates
from layerwise.acts.network_tuning import UNIT, tune_network
from layerwise.acts.tuned_forms import TunedForms, parts_of
from layerwise.calibrate.activations import Boundary
from layerwise.calibrate.forward import boundaries, forward_to, learn_output_shape
from layerwise.calibrate.passes import Calibration
from layerwise.engine.progress import Progress
from layerwise.network.overlay import Overlay
from layerwise.network.streaming import Batch, Streamer
from layerwise.roles import Tuner
from layerwise.tune.block import TunedBlock
from layerwise.tune.scope import Tuned


def tune(
    calibration: Calibration,
    candidates: Candidates,
    recipes: Mapping[str, str],
    tuner: Tuner,
    batches: tuple[Batch, ...],
    progress: Progress,
) -> Candidates:
    """The chosen recipes' stored forms after tuning, as candidates of one recipe a site.

    candidates: what the plan would write, refitted or propagated.
    batches:    the tokens to tune on: the first of the calibration's.
    """
    forms = TunedForms(calibration, candidates, dict(recipes), tuner, batches)
    if tuner.scope == "network":
        with progress.stage(f"tune by {tuner.name}", max(1, tuner.passes())) as advance:
            if not forms.has(UNIT):
                forms.keep(UNIT, tune_network(forms, batches, advance))
            forms.take_up(UNIT)
        return forms.result()
    run = _Run(forms, batches)
    blocks = calibration.network.tree.blocks
    with progress.stage(f"tune by {tuner.name}", len(blocks)) as advance:
        for index, block in enumerate(blocks):
            if not forms.has(block):
                forms.keep(block, run.tune(index))
            forms.take_up(block)
            advance()
    for boundary in run.hidden:
        boundary.remove()
    return forms.result()


class _Run:
    """Block by block: the weights so far, and the hidden states at the boundary that they have reached."""

    def __init__(self, forms: TunedForms, batches: tuple[Batch, ...]) -> None:
        calibration = self.calibration = forms.calibration
        self.forms, self.tuner, self.batches, self.network = forms, forms.tuner, batches, calibration.network
        self.remaining = frozenset(forms.candidates.order(forms.recipes))  # a plan may have taken blocks out
        weights = Overlay(self.network, forms.stored, forms.candidates.plain(forms.recipes))
        self.streamer = Streamer(self.network, weights, calibration.device)
        self.dense = calibration.inputs(batches)
        self.hidden = boundaries(forms.folder, "hidden", batches, calibration.width, len(self.dense))
        self.parts = parts_of(batches, self.tuner.sequences)

    def tune(self, index: int) -> Tuned:
        """What a tuner changes in a block, by site."""
        if index not in self.remaining:
            return Tuned({}, 0.0, 0.0)
        found, path = self.tuned_block(index, self.inputs(index)), self.network.tree.blocks[index]
        return replace(found, encoded={f"{path}.{relative}": form for relative, form in found.encoded.items()})

    # ------------------------------------------------------------ the block

    def tuned_block(self, index: int, inputs: Boundary) -> Tuned:
        streamer, path = self.streamer, self.network.tree.blocks[index]
        learn_output_shape(streamer, self.batches[0], inputs)
        sites = {s.name.removeprefix(f"{path}."): s for s in self.network.tree.of_block(path)}
        encoded = {relative: self.forms.stored[site.name]() for relative, site in sites.items()}
        encoded = {relative: form for relative, form in encoded.items() if self.tuner.touches(form)}
        dense = self.forms.dense_weights(self.network, {sites[relative]: form for relative, form in encoded.items()})
        with torch.no_grad(), streamer.head_of_network() as enter:
            calls = [enter(self.batches[i].rows(rows.start, rows.stop), index)[1] for i, rows in self.parts]
        targets = self.dense[index + 1]

        def read(boundary: Boundary, part: int) -> Tensor:
            batch, rows = self.parts[part]
            return boundary.read(batch)[rows].to(streamer.device)

        def counted(part: int) -> Tensor | None:
            batch, rows = self.parts[part]
            whole = self.batches[batch]
            return None if whole.mask is None else whole.counted[rows]

        with streamer.block(index) as block:

            def forward(weights: Mapping[str, Tensor], part: int) -> Tensor:
                named = {
                    f"{relative}.weight": (w.T if sites[relative].transposed else w).to(streamer.device)
                    for relative, w in weights.items()
                }
                out = torch.func.functional_call(block, named, (read(inputs, part), *calls[part][0]), calls[part][1])
                return out[0] if isinstance(out, tuple) else out

            task = TunedBlock(
                path, encoded, {relative: dense[sites[relative].name] for relative in encoded}, len(self.parts),
                forward, lambda part: read(targets, part), counted, self.calibration.seed * 1_000_003 + index,
            )  # fmt: skip
            return self.tuner.tune(task)

    # ------------------------------------------------------------ hidden states

    def inputs(self, index: int) -> Boundary:
        """What the tuner wants to go into block ``index``."""
        if not self.tuner.arriving:
            return self.dense[index]
        forward_to(self.streamer, index, self.batches, self.hidden, self.remaining.__contains__)
        return self.hidden[index]
