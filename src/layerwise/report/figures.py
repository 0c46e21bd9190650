"""How measured figures are worded: the same number reads the same on the page, the card and the terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerwise.report.evidence import row_named


@dataclass(frozen=True)
class Metric:
    """A quality metric: its label, digits shown, and which direction is better (0 when unknown)."""

    label: str
    note: str
    digits: int
    better: int  # -1 lower, +1 higher


METRICS = {
    "kl": Metric("KL divergence", "nats per token to the dense network, lower is better", 3, -1),
    "agreement": Metric("Agreement", "share of choices that are the dense network's, higher is better", 4, 1),
    "perplexity": Metric("Perplexity", "lower is better", 4, -1),
    "distance": Metric("Embedding distance", "mean squared, to the dense network, lower is better", 3, -1),
    "stsb_spearman": Metric("STS-B Spearman", "higher is better", 4, 1),
    "top1": Metric("Top-1 accuracy", "share of the labels met, higher is better", 4, 1),
}


def metric(name: str) -> Metric:
    """The metric of this name; an unknown one keeps its own name and claims no direction."""
    return METRICS.get(name) or Metric(name, "", 4, 0)


def short_metric(name: str) -> str:
    """A metric as it reads inside a sentence."""
    return {"kl": "KL", "stsb_spearman": "STS-B", "top1": "top-1"}.get(name, name)


def significant(value: float | None, digits: int = 3) -> str:
    """``0.010234`` -> ``0.0102``, ``23.456`` -> ``23.5``; exponents only below 1e-4 or from 1e6 on."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if power < -4 or power >= 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - power)}f}"


def probe_value(value: float | int | str | None, digits: int = 3) -> str:
    """A probe's figure as it is read: a count whole, nothing where nothing was measured."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else significant(value, digits)


def megabytes(count: int | float) -> str:
    """Bytes in the decimal unit that keeps three digits: ``90.9 MB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= 0.9995 * size:
            return f"{count / size:.{2 if count < 9.995 * size else 1 if count < 99.95 * size else 0}f} {unit}"
    return f"{count:.0f} B"


def parameters(count: int) -> str:
    """``22.7 M``."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:.{2 if count < 9.995 * size else 1}f} {unit}"
    return str(count)


def duration(seconds: float) -> str:
    """``0.42 s``, ``82 s``, ``4 min 10 s``, ``2 h 05 min``."""
    if seconds < 99.5:
        return f"{seconds:.{2 if seconds < 0.995 else 1 if seconds < 9.95 else 0}f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def steering_metric(evidence: Mapping[str, Any]) -> str | None:
    """The metric that tells the outcome: the loss itself where it was measured, else the plan's first."""
    quality = (row_named(evidence, "plan") or {"quality": {}})["quality"]
    name = evidence["loss"]["name"]
    return name if name in quality else next(iter(quality), None)


def outcome(evidence: Mapping[str, Any]) -> str:
    """One line: ``22.7 M parameters, 90.9 MB → 12.7 MB (4.48 bpw), distance 0.0102 vs baseline 0.0431``."""
    network, plan, baseline = evidence["network"], row_named(evidence, "plan"), row_named(evidence, "baseline")
    assert plan is not None  # the schema check saw to it
    line = (
        f"{parameters(network['parameters'])} parameters, {megabytes(network['dense_bytes'])} → "
        f"{megabytes(plan['bytes'])} ({plan['bpw']:.2f} bpw)"
    )
    name = steering_metric(evidence)
    if name is not None:
        digits = metric(name).digits
        line += f", {short_metric(name)} {significant(plan['quality'][name]['value'], digits)}"
        if baseline is not None and name in baseline["quality"]:
            line += f" vs baseline {significant(baseline['quality'][name]['value'], digits)}"
        elif baseline is None and name in (dense := evidence["rows"][0])["quality"] and dense["name"] == "dense":
            line += f" (dense {significant(dense['quality'][name]['value'], digits)})"
    return line


def against_baseline(evidence: Mapping[str, Any], name: str) -> tuple[str, bool] | None:
    """How the plan's metric compares with the baseline's, in words, and whether it is better; None without both."""
    plan, baseline = row_named(evidence, "plan"), row_named(evidence, "baseline")
    if plan is None or baseline is None or name not in plan["quality"] or name not in baseline["quality"]:
        return None
    ours, theirs, direction = plan["quality"][name]["value"], baseline["quality"][name]["value"], metric(name).better
    if ours is None or theirs is None or direction == 0:
        return None
    if name in ("kl", "distance") and theirs > 0:  # ratio scales with a true zero
        change = ours / theirs - 1
        if abs(change) < 0.005:
            return "the same as the baseline", True
        word = "below" if change < 0 else "above"
        return f"{abs(change):.0%} {word} the baseline" if change < 2 else f"{change + 1:.1f}× the baseline", change < 0
    gap = ours - theirs
    word = "the same as" if gap == 0 else f"{significant(abs(gap), 2)} {'above' if gap > 0 else 'below'}"
    return f"{word} the baseline", gap * direction >= 0


@dataclass(frozen=True)
class Line:
    """One line of the comparison: a label, a note, one (figure, interval) per network, the winner's index."""

    label: str
    note: str
    cells: tuple[tuple[str, str], ...]
    best: int | None = None


def comparison(evidence: Mapping[str, Any]) -> tuple[list[str], list[Line]]:
    """Dense, plan and baseline side by side: names of the networks, and one line per figure."""
    rows: Sequence[Mapping[str, Any]] = evidence["rows"]
    lines = [
        Line("Size", "bytes of all safetensors", tuple((megabytes(r["bytes"]), f"{r['bytes']:,}") for r in rows)),
        Line("Bits per weight", "", tuple((f"{r['bpw']:.2f}", "") for r in rows)),
    ]
    if any(r.get("linear_bytes") is not None for r in rows):
        cells = [(megabytes(b), "") if (b := r.get("linear_bytes")) is not None else ("–", "") for r in rows]
        lines.append(Line("Linears only", "bytes of the weight matrices", tuple(cells)))
    for name in dict.fromkeys(name for r in rows for name in r["quality"]):
        kind = metric(name)
        cells = [_quality(r["quality"].get(name), kind.digits) for r in rows]
        values = {i: r["quality"].get(name, {}).get("value") for i, r in enumerate(rows) if r["name"] != "dense"}
        known = {i: v for i, v in values.items() if v is not None}
        best = max(known, key=lambda i: known[i] * kind.better) if kind.better and len(known) > 1 else None
        lines.append(Line(kind.label, kind.note, tuple(cells), best))
    if any(r.get("latency_ms") is not None for r in rows):
        cells = [(f"{significant(t, 3)} ms", "") if (t := r.get("latency_ms")) is not None else ("–", "") for r in rows]
        lines.append(Line("Latency", "one forward pass, on the machine named below", tuple(cells)))
    return [r["name"] for r in rows], lines


def _quality(value: Mapping[str, Any] | None, digits: int) -> tuple[str, str]:
    if value is None:
        return "–", ""
    low, high = value.get("low"), value.get("high")
    interval = f"{significant(low, digits)} to {significant(high, digits)}" if None not in (low, high) else ""
    return significant(value["value"], digits), interval


# ---------------------------------------------------------------- recipes and agreement


def encoder_of(recipe: str) -> str:
    """``awq+gptq:bits=4`` -> ``gptq``."""
    return recipe.rsplit("+", 1)[-1].partition(":")[0]


def bits_of(recipe: str, bpw: float) -> str:
    """Bits of a recipe as written, or the stored width where it does not say."""
    found = re.search(r"\bbits=(\d+)\b", recipe) or re.fullmatch(r"(?:fp|bf|int)(\d+)", recipe)
    return found.group(1) if found else f"{bpw:.0f}"


@dataclass(frozen=True)
class Agreement:
    """How predictions and measurements agree over ``count`` pairs; None where it cannot be said."""

    label: str
    count: int
    spearman: float | None
    median_ratio: float | None  # measured / predicted


def agreement(sampled: Sequence[Mapping[str, Any]]) -> list[Agreement]:
    """Overall, then inside each bit width that the recipes name."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for pair in sampled:
        found = re.search(r"\bbits=(\d+)\b", pair["recipe"])
        groups.setdefault(f"{found.group(1)} bits" if found else "other", []).append(pair)
    ordered = sorted(groups.items(), key=lambda item: (not item[0][0].isdigit(), len(item[0]), item[0]))
    return [_agree("all", sampled)] + ([_agree(k, v) for k, v in ordered] if len(ordered) > 1 else [])


def _agree(label: str, pairs: Sequence[Mapping[str, Any]]) -> Agreement:
    predicted, measured = [p["predicted"] for p in pairs], [p["measured"] for p in pairs]
    ratios = sorted(m / p for p, m in zip(predicted, measured, strict=True) if p > 0)
    middle = len(ratios) // 2
    median = None if not ratios else ratios[middle] if len(ratios) % 2 else (ratios[middle - 1] + ratios[middle]) / 2
    return Agreement(label, len(pairs), spearman(predicted, measured), median)


def spearman(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Rank correlation, ties at their average rank; None for fewer than three pairs or a constant side."""
    a, b = _ranks(left), _ranks(right)
    mean = (len(a) + 1) / 2
    spread = math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))
    if len(a) < 3 or spread == 0:
        return None
    return sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True)) / spread


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for i in order[start : end + 1]:
            ranks[i] = (start + end) / 2 + 1
        start = end + 1
    return ranks
