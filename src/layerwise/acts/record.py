"""The act *prove*, written down: evidence, report page and model card of a finished run."""

from __future__ import annotations

import datetime
import platform
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwise.acts.apply import UNPREDICTED, Applied
from layerwise.acts.kept import Candidates, all_damages, size_range
from layerwise.acts.prepare import Options, Prepared
from layerwise.acts.removal import measure_on_steer
from layerwise.acts.rewriting import AS_IS
from layerwise.acts.uniform import Baseline
from layerwise.acts.wanted import predicts
from layerwise.calibrate.passes import Calibration
from layerwise.calibrate.splits import tokens_in
from layerwise.engine.machine import versions
from layerwise.engine.progress import Progress
from layerwise.evaluate.compare import Measured
from layerwise.evaluate.sentences import spearman
from layerwise.evaluate.sites import single_site_changes
from layerwise.plan.candidates import recipe_bpw
from layerwise.plan.constraints import is_dense
from layerwise.plan.pareto import front
from layerwise.plan.tree import Allocation, Node, leaves
from layerwise.recipe import parse_recipe, parse_tuner, surgery

FRONT_POINTS = 20
SAMPLED_SITES = 10


def make_evidence(
    prepared: Prepared,
    calibration: Calibration,
    candidates: Candidates,
    tree: Node,
    allocation: Allocation,
    applied: Applied,
    baseline: Baseline | None,
    measured: Mapping[str, Measured],
    budget: int,
    fingerprint: str,
    command: str,
    progress: Progress,
) -> dict[str, Any]:
    """Everything that was measured, in the schema of ``report/evidence.py``."""
    options, network, loss = prepared.options, prepared.network, prepared.loss
    parameters = network.tree.parameters
    dense_bytes = network.checkpoint.safetensors_bytes
    asked = options.budget or options.quality_loss or options.uniform or options.plan or ""
    rows = [row("dense", None, dense_bytes, None, parameters, measured["dense"], prepared)]
    sizes = applied.bytes, applied.linear_bytes
    rows.append(row("plan", options.uniform, *sizes, parameters, measured["plan"], prepared))
    if "activations" in measured:
        name, setting = "plan, quantized activations", str(prepared.activations)
        rows.append(row(name, setting, *sizes, parameters, measured["activations"], prepared))
    if baseline is not None:
        sizes = baseline.bytes, baseline.linear_bytes
        rows.append(row("baseline", baseline.recipe, *sizes, parameters, measured["baseline"], prepared))
    with progress.stage("sample sites", 1) as advance:
        sampled = [] if options.uniform else sample(prepared, calibration, candidates)
        advance()
    return {
        "format": "layerwise-evidence",
        "version": 1,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "command": command or "layerwise.compress(...)",
        **({} if network.whole else {"replan": replan_command(prepared)}),
        "network": {
            "name": network.name,
            "class": network.architecture,
            "parameters": parameters,
            "blocks": len(network.tree.blocks),
            "dense_bytes": dense_bytes,
            "dense_dtype": dense_dtype(prepared),
            "fingerprint": fingerprint,
            "sentence_transformers": (network.checkpoint.directory / "modules.json").is_file(),
        },
        "data": data(prepared),
        "budget": {"text": asked, "bytes": budget},
        "loss": {"name": loss.name, "unit": loss.unit},
        "rows": rows,
        "predicted": {"damage": allocation.damage, "measured": measured["plan"].metrics[loss.name]}
        if predicts(prepared)
        else None,
        "sites": site_rows(candidates, allocation, applied),
        **(front_of(prepared, candidates, tree) if not options.uniform else {}),
        "uniform": uniform_points(prepared, calibration, candidates, baseline, measured) if not options.uniform else [],
        "sampled": sampled,
        "checks": {
            "predicted size is the size on disk": True,
            "decoded weights finite": True,
            **remarks(prepared, candidates),
        },
        "seed": options.seed,
        "threads": options.threads,
        "versions": versions(),
        "machine": f"{platform.machine()} {platform.system()}, {options.threads} threads",
    }


def remarks(prepared: Prepared, candidates: Candidates) -> dict[str, str]:
    """What a reader of the figures should know about how they came about."""
    found = {}
    if prepared.options.sequential:
        found["propagation"] = "encoded behind the stored prefix; damages are those before propagation"
    if not predicts(prepared):
        found["damage"] = f"{UNPREDICTED}: all damages read zero"
    if prepared.activations is not None:
        found["activations"] = (
            f"{prepared.activations} at the inputs of encoded linears; damages, front and baseline are of weights "
            f"alone, and what is stored runs as the row with quantized activations"
        )
    if prepared.options.tune:
        found["tuning"] = f"{parse_tuner(prepared.options.tune)}; damages are those before tuning"
    for label in dict.fromkeys(label for refusals in candidates.refused.values() for label in refusals):
        blocks = [block for block, refusals in candidates.refused.items() if label in refusals]
        found[f"{label} left out of"] = ", ".join(blocks)
    return found


def row(
    name: str, recipe: str | None, size: int, linears: int | None, parameters: int, found: Measured, prepared: Prepared
) -> dict[str, Any]:
    quality: dict[str, Any] = {k: {"value": v} for k, v in found.metrics.items()}
    evaluation = prepared.evaluation
    if evaluation.index is not None and found.vectors is not None:
        value, low, high = spearman(found.vectors, evaluation.index, evaluation.text.pairs, prepared.options.seed)
        quality["stsb_spearman"] = {"value": value, "low": low, "high": high}
    return {
        "name": name,
        "recipe": recipe,
        "bytes": size,
        "bpw": round(8 * size / parameters, 4),
        "linear_bytes": linears,
        "quality": quality,
    }


def data(prepared: Prepared) -> dict[str, Any]:
    splits, evaluation = prepared.splits, prepared.evaluation
    count = lambda batches: sum(len(b.tokens) for b in batches)  # noqa: E731
    return {
        "calibration": {
            "source": prepared.calibration_text.source,
            "sequences": count(splits.all),
            "tokens": tokens_in(splits.all),
            "fit": count(splits.fit),
            "judge": count(splits.judge),
            "steer": count(splits.steer),
        },
        "evaluation": {
            "source": evaluation.text.source,
            "sequences": count(evaluation.batches),
            "tokens": tokens_in(evaluation.batches),
            "same_source": evaluation.same_source,
        },
    }


def dense_dtype(prepared: Prepared) -> str:
    sizes: dict[str, int] = {}
    for info in prepared.network.checkpoint.tensors.values():
        name = str(info.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + info.nbytes
    return max(sizes, key=lambda k: sizes[k])


def site_rows(candidates: Candidates, allocation: Allocation, applied: Applied) -> list[dict[str, Any]]:
    out = []
    for name, found in candidates.sites.items():
        site, chosen, planned = found.site, allocation.sites[name], applied.plan.sites[name]
        note = "the loss does not depend on it" if not found.reached and site.kind == "linear" else ""
        if site.experts and found.reached and not found.tokens:
            note = "no calibration token reached the loss through this expert"
        out.append(
            {
                "site": name,
                "block": site.block,
                "kind": "other" if site.kind == "position" else site.kind,
                "rows": site.rows,
                "columns": site.columns,
                "recipe": chosen.recipe,
                "family": family_of(chosen.recipe),
                "bytes": chosen.bytes,
                "bpw": round(recipe_bpw(chosen.recipe, site.rows, site.columns), 4),
                "damage": chosen.damage,
                "next_better": step(planned.next_better, chosen.bytes, chosen.damage),
                "next_cheaper": step(planned.next_cheaper, chosen.bytes, chosen.damage),
                "tokens": found.tokens,
                "note": note,
            }
        )
    return out


def family_of(recipe: str) -> str:
    """The family that a site was given to: that of its encoder, or of the surgeon that took its block out."""
    return "kept" if is_dense(recipe) else (surgery(recipe) or parse_recipe(recipe).encoder).family


def step(change: Any, size: int, damage: float) -> dict[str, Any] | None:
    """A neighbour with its own bytes and damage instead of differences."""
    if change is None:
        return None
    return {"recipe": change.recipe, "bytes": size + change.bytes, "damage": max(0.0, damage + change.damage)}


def front_of(prepared: Prepared, candidates: Candidates, tree: Node) -> dict[str, Any]:
    """Plans at ``FRONT_POINTS`` budgets from the smallest to the largest file, spaced evenly in ratio."""
    low, high = size_range(tree)
    fixed = prepared.range.fixed
    low = max(low, prepared.range.smallest - fixed)  # not the plan that takes every block out
    ratio = ((high + fixed) / (low + fixed)) ** (1 / (FRONT_POINTS - 1))
    budgets = [max(low, min(high, round((low + fixed) * ratio**i) - fixed)) for i in range(FRONT_POINTS)]
    names = list(dict.fromkeys(c.recipe for leaf in leaves(tree) for c in leaf.candidates))
    place = {name: i for i, name in enumerate(names)}
    points = [
        {
            "budget": budget + fixed,
            "bytes": found.bytes + fixed,
            "damage": found.damage,
            "recipes": [place[found.sites[name].recipe] for name in candidates.sites],
            "site_bytes": [found.sites[name].bytes for name in candidates.sites],
            "site_damage": [found.sites[name].damage for name in candidates.sites],
        }
        for budget, found in zip(budgets, front(tree, budgets), strict=True)
    ]
    typical = max(candidates.sites.values(), key=lambda s: s.site.parameters).site
    return {
        "front": points,
        "recipe_names": names,
        "recipe_bpw": {n: round(recipe_bpw(n, typical.rows, typical.columns), 4) for n in names},
    }


def uniform_points(
    prepared: Prepared,
    calibration: Calibration,
    candidates: Candidates,
    baseline: Baseline | None,
    measured: Mapping[str, Measured],
) -> list[dict[str, Any]]:
    """Predicted damage of one recipe everywhere: of those that all searched sites tried, the smallest of each width."""
    damages = all_damages(calibration)
    searched = [n for n, s in candidates.sites.items() if s.reached]
    shared = set.intersection(*({c.recipe for c in damages[n]} for n in searched)) if searched else set()
    fixed = prepared.range.fixed + sum(s.candidates[0].bytes for s in candidates.sites.values() if not s.reached)
    out: list[dict[str, Any]] = []
    for recipe in sorted(shared):
        chosen = [next(c for c in damages[n] if c.recipe == recipe) for n in searched]
        size, damage = fixed + sum(c.bytes for c in chosen), sum(c.damage for c in chosen)
        out.append({"recipe": recipe, "bytes": size, "damage": damage, "measured": None})
    smallest: dict[object, dict[str, Any]] = {}
    for point in sorted(out, key=lambda p: p["bytes"]):
        smallest.setdefault(width_of(point["recipe"]), point)
    out = list(smallest.values())
    if baseline is not None:
        loss = measured["baseline"].metrics[prepared.loss.name]
        out.append({"recipe": baseline.recipe, "bytes": baseline.bytes, "damage": loss, "measured": loss})
    return out


def width_of(recipe: str) -> tuple[str, int]:
    """(encoder, bits) of a recipe."""
    encoder = parse_recipe(recipe).encoder
    return encoder.name, getattr(encoder, "bits", 16)


def sample(prepared: Prepared, calibration: Calibration, candidates: Candidates) -> list[dict[str, Any]]:
    """A dozen candidates measured alone on the steer split, beside what was predicted for them."""
    kept = {
        name: {c.recipe: c for c in found.of(AS_IS)}  # a rewritten matrix alone would not be the same function
        for name, found in candidates.sites.items()
        if found.reached
    }
    pairs = single_site_changes(kept, SAMPLED_SITES)
    changes = [(site, candidates.sites[site].fetch(recipe)) for site, recipe in pairs]
    found = measure_on_steer(calibration, changes)
    return [
        {"site": site, "recipe": recipe, "predicted": kept[site][recipe].damage, "measured": value}
        for (site, recipe), value in zip(pairs, found, strict=True)
    ]


def replan_command(prepared: Prepared) -> str:
    """The command that plans for another size from the same work folder: every option that the passes depend on."""
    options, plain = prepared.options, Options(model="")
    words = ["layerwise", "compress", options.model, "OUT2", "--budget", "SIZE", "--work", options.work or "WORK"]
    for name in (
        "calibrate",
        "evaluate",
        "sequences",
        "length",
        "text_column",
        "pooling",
        "seed",
        "threads",
        "dtype",
        "device",
        "rewrite",
        "activations",
    ):
        if getattr(options, name) != getattr(plain, name):
            words += ["--" + name.replace("_", "-"), str(getattr(options, name))]
    if options.techniques:
        words += ["--techniques", ",".join(options.techniques)]
    words += [word for text in options.allocators for word in ("--allocator", text)]
    for name in ("keep", "fix"):
        for value in getattr(options, name):
            words += [f"--{name}", value]
    return shlex.join(words) + ("" if options.work else "   (after a run with --work WORK)")


def write_reports(folder: Path, evidence: dict[str, Any]) -> None:
    """``evidence.json``, ``report.html`` and the model card ``README.md``."""
    from layerwise.report.card import render_card
    from layerwise.report.evidence import check_evidence, write_evidence
    from layerwise.report.page import render_page

    check_evidence(evidence)
    write_evidence(evidence, folder / "evidence.json")
    (folder / "report.html").write_text(render_page(evidence), encoding="utf-8")
    (folder / "README.md").write_text(render_card(evidence), encoding="utf-8")
