"""The act *measure for a rule*: what published allocators read off the network, when they ask for it.

    hessians, scores   from the statistics that the search kept, or from one more reverse pass where they are too large
    influence          from the block inputs of the forward pass
    outliers, energies, spectra   from the weights and the stored forms
    slopes             by running the network on fit tokens with one matrix moved a little either way
    rises              by running the network on steer tokens with some sites in their stored form

Every figure is journaled, so that another budget or another rule on the same work folder measures nothing twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from layerwise.acts.kept import Candidates, fetches, statistics_file
from layerwise.acts.removal import block_influence, changed_on_steer
from layerwise.acts.rewriting import AS_IS, Rewriter, chain_of, kept_values
from layerwise.acts.slopes import measure_slopes
from layerwise.calibrate.kept import load_statistics
from layerwise.calibrate.passes import Calibration, reverse
from layerwise.calibrate.statistics import SiteStatistics, merged
from layerwise.engine.journal import identity_of
from layerwise.engine.progress import Progress
from layerwise.errors import InputError
from layerwise.plan.measures import Measures, Place
from layerwise.recipe import parse_technique, surgery
from layerwise.roles import Scorer
from layerwise.sensitivity.hessian import Hessian, hessian_of
from layerwise.sensitivity.spectrum import Spectrum, spectrum_of
from layerwise.technique import SECOND_MOMENT

RUNS_AT_ONCE = 32  # journaled together


@dataclass(frozen=True)
class Known:
    """A site under one alternative of its block: its matrix ``[rows, columns]`` and what was measured of it."""

    site: str
    label: str
    weight: Tensor
    statistics: SiteStatistics


@dataclass(frozen=True)
class NetworkMeasures(Measures):
    """The figures of one search's candidates. ``stage`` is the search's own."""

    calibration: Calibration
    candidates: Candidates
    stage: str
    progress: Progress
    _found: dict[str, object] = field(default_factory=dict, compare=False, repr=False)

    @property
    def places(self) -> Mapping[str, Place]:
        sites = self.candidates.sites
        return {n: Place(s.site.parameters, s.site.block, s.reached) for n, s in sites.items()}

    def hessians(self) -> Mapping[str, Hessian]:
        unit = f"{self.stage}/hessians"
        if not self.calibration.journal.has(unit):
            found = {k.site: asdict(hessian_of(k.statistics)) for k in self._known(False) if k.label == AS_IS}
            self.calibration.journal.record(unit, found)
        return {site: Hessian(**figures) for site, figures in self.calibration.journal[unit].items()}

    def scores(self, scorer: str) -> Mapping[str, Mapping[str, float]]:
        technique = parse_technique(scorer)
        if not isinstance(technique, Scorer):
            raise InputError(f"{scorer} is no scorer; candidates are scored by hessian_norm and its like")
        unit = f"{self.stage}/scores/{technique}/{self._menu()}"
        if not self.calibration.journal.has(unit):
            found: dict[str, dict[str, float]] = {}
            for known in self._known(SECOND_MOMENT in technique.needs):
                at = self.candidates.sites[known.site]
                for candidate, stored in zip(at.candidates, at.stored, strict=True):
                    if chain_of(candidate.recipe) == known.label:
                        change = stored.read().decode() - known.weight
                        value = technique.score(change, known.statistics)
                        found.setdefault(known.site, {})[candidate.recipe] = value
            self.calibration.journal.record(unit, found)
        return cast(Mapping[str, Mapping[str, float]], self.calibration.journal[unit])

    def energies(self) -> Mapping[str, Mapping[str, tuple[float, float]]]:
        unit = f"{self.stage}/energies/{self._menu()}"
        if not self.calibration.journal.has(unit):
            made: dict[str, dict[str, list[float]]] = {}
            for name, at in self.candidates.sites.items():
                for candidate, stored in zip(at.candidates, at.stored, strict=True):
                    weight = self._weight(name, chain_of(candidate.recipe)).double()
                    change = float((stored.read().decode().double() - weight).square().sum())
                    made.setdefault(name, {})[candidate.recipe] = [change, float(weight.square().sum())]
            self.calibration.journal.record(unit, made)
        found = self.calibration.journal[unit]
        return {site: {recipe: (e[0], e[1]) for recipe, e in known.items()} for site, known in found.items()}

    def slopes(self, draws: int, size: float) -> Mapping[str, float]:
        unit = f"{self.stage}/slopes/{draws}/{size}"
        if not self.calibration.journal.has(unit):
            reached = [s.site for s in self.candidates.sites.values() if s.reached and s.site.kind == "linear"]
            with self.progress.stage("move matrices", len(reached)) as advance:
                self.calibration.journal.record(unit, measure_slopes(self.calibration, reached, draws, size, advance))
        return cast(Mapping[str, float], self.calibration.journal[unit])

    def influence(self) -> Mapping[str, float]:
        network, unit = self.candidates.network, f"{self.stage}/influence"
        if network.whole:
            return {}
        if not self.calibration.journal.has(unit):
            batches, states = self.calibration.splits.all, self.calibration.inputs()
            values = {
                block: block_influence(states[i], states[i + 1], batches, 0)
                for i, part in enumerate(network.parts)
                for block in part
            }
            self.calibration.journal.record(unit, values)
        return cast(Mapping[str, float], self.calibration.journal[unit])

    def outliers(self) -> Mapping[str, float]:
        network = self.candidates.network
        if "outliers" not in self._found:
            self._found["outliers"] = {
                block: above_one_deviation([network.read_site(s) for s in network.tree.of_block(block)])
                for block in network.tree.blocks
            }
        return cast(Mapping[str, float], self._found["outliers"])

    def spectra(self) -> Mapping[str, Spectrum]:
        if "spectra" not in self._found:
            network, sites = self.candidates.network, self.candidates.sites
            self._found["spectra"] = {
                name: spectrum_of(network.read_site(s.site))
                for name, s in sites.items()
                if s.reached and s.site.searched
            }
        return cast(Mapping[str, Spectrum], self._found["spectra"])

    def rises(self, changes: Sequence[Mapping[str, str]]) -> list[float]:
        for change in changes:
            for site, recipe in change.items():
                if surgery(recipe) or chain_of(recipe) != AS_IS:
                    raise InputError(
                        f"{recipe} at {site} cannot be measured alone: it changes other matrices of its block; "
                        f"leave the rewrite out, or choose an allocator that runs nothing, such as hawq"
                    )
        journal, keys = self.calibration.journal, [self._key(change) for change in changes]
        missing = {key: change for key, change in zip(keys, changes, strict=True) if not journal.has(key)}
        todo = list(missing.items())
        if todo:
            with self.progress.stage("run candidates", -(-len(todo) // RUNS_AT_ONCE)) as advance:
                for start in range(0, len(todo), RUNS_AT_ONCE):
                    part = todo[start : start + RUNS_AT_ONCE]
                    runs = [fetches(self.candidates, change) for _, change in part]
                    for (key, _), value in zip(part, changed_on_steer(self.calibration, runs), strict=True):
                        journal.record(key, value)
                    advance()
        return [float(journal[key]) for key in keys]

    def _key(self, change: Mapping[str, str]) -> str:
        return f"{self.stage}/run/{identity_of(dict(change))[:24]}"

    def _menu(self) -> str:
        offered = {n: [c.recipe for c in s.candidates] for n, s in self.candidates.sites.items()}
        return identity_of({"sites": json.dumps(offered)})[:16]

    def _known(self, whole_inputs: bool) -> Iterator[Known]:
        """Every reached site under each alternative that it has candidates for, and "as is"."""
        labels = {
            name: dict.fromkeys([AS_IS, *(chain_of(c.recipe) for c in s.candidates if not surgery(c.recipe))])
            for name, s in self.candidates.sites.items()
            if s.reached and s.site.searched
        }
        wanted = [(name, label) for name, found in labels.items() for label in found]
        files = {(n, label): statistics_file(self.candidates.folder, n, label) for n, label in wanted}
        if all(file.is_file() for file in files.values()) and (self.calibration.whole_inputs or not whole_inputs):
            for name, label in wanted:
                yield Known(name, label, self._weight(name, label), load_statistics(files[name, label]))
            return
        yield from self._by_pass(labels, whole_inputs)

    def _weight(self, name: str, label: str) -> Tensor:
        site = self.candidates.sites[name].site
        if label == AS_IS or site.block is None:
            return self.candidates.network.read_site(site)
        return kept_values(self.candidates.folder, site.block, label, "weight")[name]

    def _by_pass(self, labels: Mapping[str, Mapping[str, None]], whole_inputs: bool) -> Iterator[Known]:
        calibration = replace(self.calibration, whole_inputs=whole_inputs or self.calibration.whole_inputs)
        network, rewriter = self.candidates.network, Rewriter(calibration)
        with self.progress.stage("measure for the allocator", len(calibration.units())) as advance:
            for part in reverse(calibration, ()):
                mine = {name: labels[name] for name in part.sites if name in labels}
                for label in dict.fromkeys(label for found in mine.values() for label in found):
                    made = None if label == AS_IS else rewriter.alternative(part, label)
                    sites = made.sites if made else part.sites
                    for name in (n for n in mine if label in mine[n]):
                        site = self.candidates.sites[name].site
                        weight = made.weights[name] if made else network.read_site(site)
                        yield Known(name, label, weight, merged(sites[name].fit, sites[name].judge))
                del part
                advance()


def above_one_deviation(weights: Sequence[Tensor]) -> float:
    """Share of all weights with ``(w - mean) / std > 1``, mean and deviation over all of them."""
    count = sum(w.numel() for w in weights)
    mean = sum(float(w.double().sum()) for w in weights) / max(1, count)
    variance = sum(float((w.double() - mean).square().sum()) for w in weights) / max(1, count)
    edge = mean + variance**0.5
    return sum(int(torch.count_nonzero(w.double() > edge)) for w in weights) / max(1, count)
