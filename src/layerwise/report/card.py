"""The model card: ``README.md`` of an artifact, readable by people and by the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from layerwise.report.evidence import check_evidence, low_coverage, row_named
from layerwise.report.figures import (
    agreement,
    comparison,
    duration,
    megabytes,
    metric,
    outcome,
    parameters,
    significant,
)

# Class suffix -> the hub's task and the transformers class that loads it.
TASKS = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "LMHeadModel": ("text-generation", "AutoModelForCausalLM"),
    "ForMaskedLM": ("fill-mask", "AutoModelForMaskedLM"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForImageClassification": ("image-classification", "AutoModelForImageClassification"),
}


def render_card(evidence: dict[str, Any]) -> str:
    """Markdown with a YAML front matter. Raises ``InputError`` for evidence outside the schema."""
    check_evidence(evidence)
    name = evidence["network"]["name"].rstrip("/").rpartition("/")[2] or "network"
    sections = [
        _front_matter(evidence),
        f"# {plain(name)}, {_plan_bpw(evidence)} bits per weight",
        f"{plain(outcome(evidence))}.",
        _result(evidence),
        _loading(evidence),
        _making(evidence),
        _limits(evidence),
    ]
    return "\n\n".join(sections) + "\n"


def plain(text: str) -> str:
    """Text that markdown and HTML show as it is, on one line."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\*_\[\]|#~$!])", r"\\\1", text)
    return text.replace("`", "&#96;")  # an escaped backtick would still pair up in lenient renderers


def code(text: str) -> str:
    """A code span whose fence is longer than any run of backticks inside."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text).replace("|", "¦")
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _block(text: str, language: str) -> str:
    fence = "`" * max(3, max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _plan_bpw(evidence: Mapping[str, Any]) -> str:
    plan = row_named(evidence, "plan")
    assert plan is not None
    return f"{plan['bpw']:.2f}"


def _task(network: Mapping[str, Any]) -> tuple[str, str]:
    for suffix, task in TASKS.items():
        if network["class"].endswith(suffix):
            return task
    return ("sentence-similarity" if network.get("sentence_transformers") else "feature-extraction"), "AutoModel"


def _front_matter(evidence: Mapping[str, Any]) -> str:
    network = evidence["network"]
    lines = ["---", "library_name: layerwise"]
    # The hub refuses a card whose base_model is not a repository id, so a local directory is left out.
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", network["name"], re.ASCII):
        lines += [f"base_model: {json.dumps(network['name'])}", "base_model_relation: quantized"]
    lines += [f"pipeline_tag: {_task(network)[0]}", "tags:", "- layerwise", "- quantized", "- mixed-precision"]
    if network.get("sentence_transformers"):
        lines.append("- sentence-transformers")
    return "\n".join([*lines, "---"])


def _result(evidence: Mapping[str, Any]) -> str:
    names, lines = comparison(evidence)
    table = ["| | " + " | ".join(plain(n) for n in names) + " |", "|---|" + "---:|" * len(names)]
    for line in lines:
        cells = [
            (f"**{plain(value)}**" if index == line.best else plain(value)) + (f"<br><sub>{note}</sub>" if note else "")
            for index, (value, note) in enumerate(line.cells)
        ]
        label = plain(line.label) + (f"<br><sub>{plain(line.note)}</sub>" if line.note else "")
        table.append(f"| {label} | " + " | ".join(cells) + " |")
    after = []
    baseline = row_named(evidence, "baseline")
    if baseline is not None and baseline.get("recipe"):
        after.append(f"The baseline is {code(str(baseline['recipe']))} on every linear.")
    evaluation = evidence["data"].get("evaluation")
    if evaluation is not None:
        after.append(
            f"Measured on {code(evaluation['source'])}: {evaluation['sequences']:,} sequences, "
            f"{evaluation['tokens']:,} tokens"
            + (", set aside from the calibration text (same source)." if evaluation["same_source"] else ".")
        )
    return "\n".join(["## Result", "", *table, "", " ".join(after)]).rstrip()


def _loading(evidence: Mapping[str, Any]) -> str:
    network = evidence["network"]
    auto = _task(network)[1]
    own = network["class"] if network["class"].isidentifier() else "its own class"
    lines = [
        "import layerwise",
        "",
        f'network = layerwise.load("PATH")  # this folder; a torch module, {own}',
        "",
        "# or with transformers, once layerwise has been imported",
        f"from transformers import {auto}",
        "",
        f'network = {auto}.from_pretrained("PATH")',
    ]
    if network.get("sentence_transformers"):
        lines += [
            "",
            "# or with sentence-transformers, once layerwise has been imported",
            "from sentence_transformers import SentenceTransformer",
            "",
            'encoder = SentenceTransformer("PATH")',
        ]
    return "\n\n".join(
        [
            "## How to load it",
            _block("\n".join(lines), "python"),
            "The weights stay packed in memory and are multiplied from their packed form. For a tool that does not "
            "know layerwise, write a plain fp16 checkpoint:",
            _block("layerwise export PATH DIRECTORY --to dense", "bash"),
        ]
    )


def _making(evidence: Mapping[str, Any]) -> str:
    network, calibration = evidence["network"], evidence["data"]["calibration"]
    encoders: dict[str, list[int]] = {}
    for site in evidence["sites"]:
        count = encoders.setdefault(site["recipe"], [0, 0])
        count[0] += 1
        count[1] += site["bytes"]
    biggest = sorted(encoders.items(), key=lambda item: (-item[1][1], item[0]))
    table = ["| recipe | sites | bytes |", "|---|---:|---:|"]
    table += [f"| {code(recipe)} | {count} | {megabytes(size)} |" for recipe, (count, size) in biggest[:8]]
    if len(biggest) > 8:
        rest = [v for _, v in biggest[8:]]
        table.append(f"| {len(rest)} more | {sum(r[0] for r in rest)} | {megabytes(sum(r[1] for r in rest))} |")
    text = (
        f"[layerwise](report.html) measured every layer of {code(network['name'])} "
        f"({parameters(network['parameters'])} parameters, {network['blocks']} blocks) on "
        f"{calibration['sequences']:,} sequences ({calibration['tokens']:,} tokens) of "
        f"{code(calibration['source'])} and {_choice(evidence)}. No weights were trained."
    )
    seconds = duration(evidence["seconds"].get("total", sum(evidence["seconds"].values())))
    memory = evidence.get("peak_memory")
    cost = f"It took {seconds}" + (f" and {megabytes(memory)} of memory" if memory else "") + ". To repeat it:"
    parts = ["## How it was made", text, "\n".join(table), cost, _block(evidence["command"], "bash")]
    if evidence.get("replan"):
        parts += ["Another budget, in seconds, from the same measurements:", _block(evidence["replan"], "bash")]
    parts.append(
        "`plan.json` holds what was chosen where, `evidence.json` every figure with its seed and versions, and "
        "`report.html` shows both."
    )
    return "\n\n".join(parts)


def _choice(evidence: Mapping[str, Any]) -> str:
    plan = row_named(evidence, "plan")
    assert plan is not None
    if plan.get("recipe"):
        return f"encoded every linear with {code(str(plan['recipe']))}"
    budget = f" within a budget of {code(evidence['budget']['text'])}" if "budget" in evidence else ""
    return (
        f"predicted the rise of the loss ({plain(evidence['loss']['unit'])}) for every candidate at every site, then "
        f"chose the plan with the least predicted rise{budget}"
    )


def _limits(evidence: Mapping[str, Any]) -> str:
    limits = [
        "Layers were judged on the calibration text. On text of another kind (language, domain, length) the loss may "
        "be larger than the table says: measure on yours with `layerwise evaluate`.",
        "It has the original's abilities, biases and licence, and nothing was tested beyond the figures above.",
        "Plain transformers without layerwise refuses the packed file, on purpose: export it instead.",
    ]
    evaluation = evidence["data"].get("evaluation")
    if evaluation is None:
        limits.insert(0, "It was not evaluated on held-out data.")
    elif evaluation["same_source"]:
        limits.insert(
            1, "The evaluation text comes from the same source as the calibration text; other text may fare worse."
        )
    if row_named(evidence, "baseline") is None:
        limits.append("No uniform baseline was measured beside it.")
    limits += _lost_lines(evidence)
    overall = agreement(evidence.get("sampled", []))[0]
    if overall.median_ratio is not None:
        correlation = f", rank correlation {overall.spearman:.2f}" if overall.spearman is not None else ""
        limits.append(
            f"Damage is a second-order prediction: over {overall.count} sampled single-site changes the measured rise "
            f"was {significant(overall.median_ratio, 2)} times the predicted (median){correlation}. It is least "
            "reliable at two bits and below."
        )
    else:
        limits.append("Damage is a second-order prediction, least reliable at two bits and below.")
    thin = [s["site"] for s in evidence["sites"] if low_coverage(s)]
    if thin:
        shown = ", ".join(code(s) for s in thin[:6]) + (f" and {len(thin) - 6} more" if len(thin) > 6 else "")
        limits.append(f"Little was measured at {shown}; see the report.")
    if not any(row.get("latency_ms") for row in evidence["rows"]):
        limits.append("No speed was measured and none is claimed.")
    return "\n".join(["## Limits", "", *(f"- {limit}" for limit in limits)])


def _lost_lines(evidence: Mapping[str, Any]) -> list[str]:
    """Metrics in which the baseline did better: said aloud."""
    plan, baseline = row_named(evidence, "plan"), row_named(evidence, "baseline")
    if plan is None or baseline is None:
        return []
    lost = []
    for name, quality in plan["quality"].items():
        ours, theirs = quality["value"], baseline["quality"].get(name, {"value": None})["value"]
        kind = metric(name)
        if ours is not None and theirs is not None and (ours - theirs) * kind.better < 0:
            lost.append(f"The uniform baseline has the better {plain(kind.label)}.")
    return lost
