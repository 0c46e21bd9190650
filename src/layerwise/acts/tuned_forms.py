"""The stored forms of a tuning: what it starts from, what is finished, and where both lie.

Journaled by unit, a block or the network, beside the passes: a run that was killed goes on with the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from layerwise.acts.kept import Candidates, Fetches, SiteCandidates, Stored, fetches
from layerwise.acts.rewriting import kept_values
from layerwise.calibrate.passes import Calibration
from layerwise.encoding.encoded import Encoded, layout_bytes
from layerwise.engine.journal import identity_of
from layerwise.network.network import Network
from layerwise.network.safetensors_file import write
from layerwise.network.sites import Site
from layerwise.network.streaming import Batch
from layerwise.roles import Tuner
from layerwise.tune.scope import Tuned


class TunedForms:
    """One tuning's files and journal entries, named after the tuner, the recipes and the forms that it starts from."""

    def __init__(
        self,
        calibration: Calibration,
        candidates: Candidates,
        recipes: dict[str, str],
        tuner: Tuner,
        batches: tuple[Batch, ...],
    ) -> None:
        self.calibration, self.candidates, self.recipes, self.tuner = calibration, candidates, recipes, tuner
        self.stored: Fetches = fetches(candidates, recipes)
        files = [str(file_of(candidates, name, recipes[name]).relative_to(calibration.folder)) for name in self.stored]
        tokens = sum(b.tokens.numel() for b in batches)
        start = {"recipes": recipes, "files": files, "tuner": repr(tuner), "tokens": tokens}
        self.key = identity_of(start)[:16]
        self.folder = calibration.folder / f"tuned-{self.key}"
        self.folder.mkdir(exist_ok=True)
        self.labels = candidates.alternatives(recipes)
        self.sites: dict[str, SiteCandidates] = {}  # what is finished

    def has(self, unit: str) -> bool:
        return self.calibration.journal.has(self._entry(unit))

    def keep(self, unit: str, found: Tuned) -> None:
        """Write what a tuner changed, by site, and journal it."""
        specs = {}
        for name, encoded in found.encoded.items():
            check_layout(name, self.stored[name](), encoded)
            tensors = {f"0/weight{suffix}": tensor.cpu() for suffix, tensor in encoded.tensors().items()}
            layout = {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()}
            write(self._file(name), layout, tensors.__getitem__)
            specs[name] = encoded.spec()
        self.calibration.journal.record(self._entry(unit), {"sites": specs, "error": [found.before, found.after]})

    def take_up(self, unit: str) -> None:
        """Put a finished unit's tuned forms in place of the old ones."""
        for site, spec in self.calibration.journal[self._entry(unit)]["sites"].items():
            stored = Stored(self._file(site), 0, spec)
            found, self.stored[site] = self.candidates.sites[site], stored.read
            chosen = next(c for c in found.candidates if c.recipe == self.recipes[site])
            self.sites[site] = replace(found, candidates=(chosen,), stored=(stored,))

    def result(self) -> Candidates:
        return replace(self.candidates, sites=self.candidates.sites | self.sites)

    def dense_weights(self, network: Network, encoded: Mapping[Site, Encoded]) -> dict[str, Tensor]:
        """Site -> the matrix that was encoded, rewritten where the plan takes its block rewritten.

        Where a rewritten matrix was not kept, its stored form stands for it.
        """
        kept: dict[str, Tensor] = {}
        for block in {site.block for site in encoded}:
            if block in self.labels:
                kept |= kept_values(self.candidates.folder, block, self.labels[block], "weight")
        return {
            site.name: network.read_site(site)
            if site.block not in self.labels
            else kept[site.name] if site.name in kept else form.decode()
            for site, form in encoded.items()
        }  # fmt: skip

    def _entry(self, unit: str) -> str:
        return f"tuned/{self.key}/{unit}"

    def _file(self, site: str) -> Path:
        return self.folder / f"{site}.safetensors"


def parts_of(batches: tuple[Batch, ...], sequences: int) -> list[tuple[int, slice]]:
    """(batch, rows) of every part: at most ``sequences`` of one batch each."""
    return [
        (i, slice(start, min(start + sequences, len(batch.tokens))))
        for i, batch in enumerate(batches)
        for start in range(0, len(batch.tokens), sequences)
    ]


def file_of(candidates: Candidates, name: str, recipe: str) -> Path:
    found = candidates.sites[name]
    return found.stored[[c.recipe for c in found.candidates].index(recipe)].file


def check_layout(name: str, old: Encoded, new: Encoded) -> None:
    """A tuner that changes a layout would break the promised size: that is our mistake, not the user's."""
    sizes: list[Any] = [{k: (t.dtype, tuple(t.shape)) for k, t in form.tensors().items()} for form in (old, new)]
    if sizes[0] != sizes[1] or old.spec() != new.spec():
        raise RuntimeError(
            f"tuning changed the layout of {name} from {layout_bytes(sizes[0])} to {layout_bytes(sizes[1])} bytes"
        )
