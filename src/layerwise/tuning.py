"""The act *tune* (``--tune``): with the plan fixed, improve each block's stored values against the dense block.

    stored, tuned prefix ─→ x' ─→ block i ─ tuner: stored form of block i against the dense block's output ─→ x' …
    dense network        ─→ x  ─→ block i ─→ y

Blocks are taken in order of execution, one in memory. A tuner sees the calibration tokens, what goes into the block
(what arrives behind the stored blocks before it, or the dense network's own inputs, as it declares), what the dense
block gave in the dense network, and the stored forms that the plan chose; it returns other values in the same forms.
Sizes cannot change; the plan's damages are those before tuning. Journaled by block: a run that was killed goes on with
the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.calibrate.activations import Boundary
from layerwise.calibrate.forward import boundaries, enter_network, forward_block, learn_output_shape
from layerwise.calibrate.passes import Calibration
from layerwise.encoding.encoded import Encoded, layout_bytes
from layerwise.engine.journal import identity_of
from layerwise.engine.progress import Progress
from layerwise.kept import Candidates, Fetches, Stored, fetches
from layerwise.network.overlay import Overlay
from layerwise.network.safetensors_file import write
from layerwise.network.sites import Site
from layerwise.network.streaming import Batch, Streamer
from layerwise.rewriting import kept_values
from layerwise.technique import Tuner
from layerwise.tune.block import Tuned, TunedBlock


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
    run = _Run(calibration, candidates, dict(recipes), tuner, batches)
    blocks = calibration.network.tree.blocks
    with progress.stage(f"tune by {tuner.name}", len(blocks)) as advance:
        for index, block in enumerate(blocks):
            if not calibration.journal.has(run.entry(block)):
                calibration.journal.record(run.entry(block), run.tune(index))
            run.take_up(block)
            advance()
    for boundary in run.hidden:
        boundary.remove()
    return replace(candidates, sites=candidates.sites | run.tuned)


class _Run:
    """One tuning: the weights so far, and the hidden states at the boundary that they have reached."""

    def __init__(
        self,
        calibration: Calibration,
        candidates: Candidates,
        recipes: dict[str, str],
        tuner: Tuner,
        batches: tuple[Batch, ...],
    ) -> None:
        self.calibration, self.candidates, self.recipes = calibration, candidates, recipes
        self.tuner, self.batches, self.network = tuner, batches, calibration.network
        self.stored: Fetches = fetches(candidates, recipes)
        files = [str(file_of(candidates, name, recipes[name]).relative_to(calibration.folder)) for name in self.stored]
        self.remaining = frozenset(candidates.order(recipes))  # a plan may have taken blocks out
        tokens = sum(b.tokens.numel() for b in batches)
        start = {"recipes": recipes, "files": files, "tuner": repr(tuner), "tokens": tokens}
        self.key = identity_of(start)[:16]
        self.folder = calibration.folder / f"tuned-{self.key}"
        self.folder.mkdir(exist_ok=True)
        self.labels, self.plain = candidates.alternatives(recipes), candidates.plain(recipes)
        self.tuned: dict[str, Any] = {}
        self.weights = Overlay(self.network, self.stored, self.plain)
        self.streamer = Streamer(self.network, self.weights, calibration.device)
        self.dense = calibration.inputs(batches)
        self.hidden = boundaries(self.folder, "hidden", batches, calibration.width, len(self.dense))
        self.parts = [
            (i, slice(start, min(start + tuner.sequences, len(batch.tokens))))
            for i, batch in enumerate(batches)
            for start in range(0, len(batch.tokens), tuner.sequences)
        ]

    def entry(self, block: str) -> str:
        return f"tuned/{self.key}/{block}"

    def tune(self, index: int) -> dict[str, Any]:
        """Tune a block and write what changed; returns the journal's entry."""
        if index not in self.remaining:
            return {"sites": {}, "error": [0.0, 0.0]}
        inputs = self.inputs(index)
        found = self.tuned_block(index, inputs)
        specs, path = {}, self.network.tree.blocks[index]
        for relative, encoded in found.encoded.items():
            name = f"{path}.{relative}"
            check_layout(name, self.stored[name](), encoded)
            tensors = {f"0/weight{suffix}": tensor.cpu() for suffix, tensor in encoded.tensors().items()}
            layout = {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()}
            write(self.file(name), layout, tensors.__getitem__)
            specs[name] = encoded.spec()
        return {"sites": specs, "error": [found.before, found.after]}

    def take_up(self, block: str) -> None:
        """Put a finished block's tuned forms in place of the old ones."""
        for site, spec in self.calibration.journal[self.entry(block)]["sites"].items():
            stored = Stored(self.file(site), 0, spec)
            found, self.stored[site] = self.candidates.sites[site], stored.read
            chosen = next(c for c in found.candidates if c.recipe == self.recipes[site])
            self.tuned[site] = replace(found, candidates=(chosen,), stored=(stored,))

    def file(self, site: str) -> Path:
        return self.folder / f"{site}.safetensors"

    # ------------------------------------------------------------ the block

    def tuned_block(self, index: int, inputs: Boundary) -> Tuned:
        streamer, path = self.streamer, self.network.tree.blocks[index]
        learn_output_shape(streamer, self.batches[0], inputs)
        sites = {s.name.removeprefix(f"{path}."): s for s in self.network.tree.of_block(path)}
        encoded = {relative: self.stored[site.name]() for relative, site in sites.items()}
        encoded = {relative: form for relative, form in encoded.items() if self.tuner.touches(form)}
        dense = self.dense_weights(path, {relative: sites[relative] for relative in encoded}, encoded)
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
                path, encoded, dense, len(self.parts), forward, lambda part: read(targets, part), counted,
                self.calibration.seed * 1_000_003 + index,
            )  # fmt: skip
            return self.tuner.tune(task)

    def dense_weights(self, path: str, sites: Mapping[str, Site], encoded: Mapping[str, Encoded]) -> dict[str, Tensor]:
        """The matrices that were encoded, rewritten where the plan takes the block rewritten.

        Where a rewritten matrix was not kept, its stored form stands for it.
        """
        label = self.labels.get(path)
        if label is None:
            return {relative: self.network.read_site(site) for relative, site in sites.items()}
        kept = kept_values(self.candidates.folder, path, label, "weight")
        return {r: kept[s.name] if s.name in kept else encoded[r].decode() for r, s in sites.items()}

    # ------------------------------------------------------------ hidden states

    def inputs(self, index: int) -> Boundary:
        """What the tuner wants to go into block ``index``."""
        if not self.tuner.arriving:
            return self.dense[index]
        self.arrive(index)
        return self.hidden[index]

    def arrive(self, index: int) -> None:
        """Make sure that the hidden states in front of block ``index`` are there, behind what is stored before it."""
        if self.hidden[index].complete:
            return
        if index == 0:
            enter_network(self.streamer, self.batches, self.hidden[0])
            return
        self.arrive(index - 1)
        before, after = self.hidden[index - 1], self.hidden[index]
        if index - 1 in self.remaining:
            forward_block(self.streamer, index - 1, self.batches, before, after)
        else:
            after.write(before.read(i) for i in range(len(self.batches)))
        self.hidden[index - 1].remove()


def file_of(candidates: Candidates, name: str, recipe: str) -> Path:
    found = candidates.sites[name]
    return found.stored[[c.recipe for c in found.candidates].index(recipe)].file


def check_layout(name: str, old: Encoded, new: Encoded) -> None:
    """A tuner that changes a layout would break the promised size: that is our mistake, not the user's."""
    sizes = [{k: (t.dtype, tuple(t.shape)) for k, t in form.tensors().items()} for form in (old, new)]
    if sizes[0] != sizes[1] or old.spec() != new.spec():
        raise RuntimeError(
            f"tuning changed the layout of {name} from {layout_bytes(sizes[0])} to {layout_bytes(sizes[1])} bytes"
        )
