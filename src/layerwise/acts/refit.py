"""The act *refit*: encode the chosen recipes once more, on all the tokens that statistics were gathered from.

Candidates are encoded on the fit split, so that their damage can be judged on tokens no encoder has seen. Once the
plan stands there is nothing left to judge, and the judge split's tokens make the same recipes better: the layouts, and
so the sizes, stay; the damages of the plan are those before the refit, and so a little too high.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from layerwise.acts.candidates import find_candidates
from layerwise.acts.kept import Candidates, SiteCandidates, Stored, statistics_file
from layerwise.acts.rewriting import chain_of, kept_values
from layerwise.calibrate.kept import load_statistics
from layerwise.calibrate.passes import Calibration, reverse_uniform
from layerwise.encoding.encoded import Encoded
from layerwise.engine.journal import identity_of
from layerwise.engine.progress import Progress
from layerwise.engine.workers import each
from layerwise.network.safetensors_file import write
from layerwise.plan.constraints import is_dense
from layerwise.plan.menu import Menu
from layerwise.recipe import parse_recipe, surgery


def refit(
    calibration: Calibration, candidates: Candidates, recipes: Mapping[str, str], workers: int, progress: Progress
) -> Candidates:
    """The chosen recipes encoded on fit and judge tokens together, as candidates of one recipe a site.

    Journaled by block, so that a run that was killed goes on here too.
    """
    folder = calibration.folder / "refit"
    folder.mkdir(exist_ok=True)
    blocks: dict[str | None, list[str]] = {}
    for name in recipes:
        if surgery(recipes[name]):
            continue
        if needs_refit(candidates, name, recipes[name]):
            blocks.setdefault(candidates.sites[name].site.block, []).append(name)
    refitted: dict[str, SiteCandidates] = {}
    with progress.stage("refit the plan", len(blocks)) as advance:
        for block, names in blocks.items():
            key = identity_of({"stage": candidates.folder.name, "recipes": {n: recipes[n] for n in names}})[:16]
            unit = f"refit/{block or 'outside'}/{key}"
            if not calibration.journal.has(unit):
                calibration.journal.record(unit, encode(calibration, candidates, recipes, block, names, key, workers))
            for name, spec in calibration.journal[unit].items():
                found = candidates.sites[name]
                chosen = next(c for c in found.candidates if c.recipe == recipes[name])
                stored = Stored(folder / f"{name}.{key}.safetensors", 0, spec)
                refitted[name] = replace(found, candidates=(chosen,), stored=(stored,))
            advance()
    return replace(candidates, sites=candidates.sites | refitted)


def refit_by_pass(
    calibration: Calibration, candidates: Candidates, recipes: Mapping[str, str], workers: int, progress: Progress
) -> Candidates:
    """The same for a network whose statistics are too large to keep: one more reverse pass, over all tokens."""
    key = identity_of({"stage": candidates.folder.name, "recipes": dict(recipes)})[:16]
    # A site whose block is gone is encoded as the cheapest it can be and then left out.
    encoded = {n: candidates.sites[n].candidates[0].recipe if surgery(r) else r for n, r in recipes.items()}
    return find_candidates(
        calibration, Menu((), ()), workers, progress, f"refit {key}", encoded, reverse_uniform
    )  # fmt: skip


def needs_refit(candidates: Candidates, name: str, recipe: str) -> bool:
    """Whether a site's recipe rounds by statistics, and they were kept."""
    technique = parse_recipe(recipe).encoder
    has_statistics = statistics_file(candidates.folder, name, chain_of(recipe)).is_file()
    return bool(technique.needs) and not is_dense(recipe) and has_statistics


def encode(
    calibration: Calibration,
    candidates: Candidates,
    recipes: Mapping[str, str],
    block: str | None,
    names: list[str],
    key: str,
    workers: int,
) -> dict[str, Any]:
    """Encode some sites of a block and write them; returns the journal's entry: site -> spec."""
    label = candidates.alternatives(recipes).get(block) if block else None
    weights: dict[str, Tensor] = kept_values(candidates.folder, block, label, "weight") if block and label else {}

    def work(name: str) -> Encoded:
        site = candidates.sites[name].site
        weight = weights[name] if name in weights else calibration.network.read_site(site)
        statistics = load_statistics(statistics_file(candidates.folder, name, chain_of(recipes[name])))
        return parse_recipe(recipes[name]).encoder.encode(weight, statistics)

    specs = {}
    for name, encoded in zip(names, each(work, names, workers), strict=True):
        tensors = {f"0/weight{suffix}": tensor for suffix, tensor in encoded.tensors().items()}
        layout = {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()}
        write(calibration.folder / "refit" / f"{name}.{key}.safetensors", layout, tensors.__getitem__)
        specs[name] = encoded.spec()
    return specs
