"""The parts of the page that need no script: tiles, tables, bars, and the commands. Each returns HTML."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from layerwise.report.evidence import low_coverage, row_named
from layerwise.report.figures import (
    against_baseline,
    agreement,
    bits_of,
    comparison,
    duration,
    encoder_of,
    megabytes,
    metric,
    significant,
    steering_metric,
)

MOST_BARS = 10


def tiles(evidence: Mapping[str, Any]) -> str:
    """The figures that a reader looks for first."""
    dense, plan = row_named(evidence, "dense"), row_named(evidence, "plan")
    assert dense is not None and plan is not None
    shown = [
        ("Size", megabytes(plan["bytes"]), f"{1 - plan['bytes'] / max(1, dense['bytes']):.0%} smaller than dense", ""),
        ("Bits per weight", f"{plan['bpw']:.2f}", f"dense {dense['bpw']:.2f}", ""),
    ]
    first = steering_metric(evidence)
    for name in sorted(plan["quality"], key=lambda n: n != first)[:2]:
        kind = metric(name)
        against = against_baseline(evidence, name)
        note, tone = (against[0], "good" if against[1] else "bad") if against else ("", "")
        if not note and name in dense["quality"]:
            note = f"dense {significant(dense['quality'][name]['value'], kind.digits)}"
        shown.append((kind.label, significant(plan["quality"][name]["value"], kind.digits), note, tone))
    predicted = evidence.get("predicted")
    if predicted and predicted.get("measured") is not None and predicted["damage"] > 0:
        ratio = predicted["measured"] / predicted["damage"]
        shown.append(("Measured ÷ predicted", f"{ratio:.2f}", f"predicted {significant(predicted['damage'])}", ""))
    seconds = evidence["seconds"]
    memory = f"peak memory {megabytes(evidence['peak_memory'])}" if evidence.get("peak_memory") else ""
    shown.append(("Time", duration(seconds.get("total", sum(seconds.values()))), memory, ""))
    return "".join(
        f"<div class='tile'><dt>{escape(label)}</dt><dd><b>{escape(value)}</b>"
        f"<span class='{tone}'>{escape(note)}</span></dd></div>"
        for label, value, note, tone in shown
    )


def evaluation(evidence: Mapping[str, Any]) -> str:
    """Dense, plan and baseline side by side; one line per figure."""
    names, lines = comparison(evidence)
    head = "".join(
        f"<th scope='col'>{escape(name)}{_recipe(row.get('recipe'))}</th>"
        for name, row in zip(names, evidence["rows"], strict=True)
    )
    body = ""
    for line in lines:
        note = f"<small>{escape(line.note)}</small>" if line.note else ""
        body += f"<tr><th scope='row'>{escape(line.label)}{note}</th>"
        for index, (value, remark) in enumerate(line.cells):
            best = " class='best'" if index == line.best else ""
            shown = escape(value) + ("<i class='unseen'> (best)</i>" if best else "")
            body += f"<td{best}>{shown}" + (f"<small>{escape(remark)}</small>" if remark else "") + "</td>"
        body += "</tr>"
    held_out = evidence["data"].get("evaluation")
    if held_out is None:
        source = "Nothing was evaluated on held-out data."
    else:
        same = " It was set aside from the calibration text: same source." if held_out["same_source"] else ""
        source = (
            f"Held-out data: <code>{escape(held_out['source'])}</code>, {held_out['sequences']:,} sequences, "
            f"{held_out['tokens']:,} tokens.{same}"
        )
    if row_named(evidence, "baseline") is None:
        source += " No uniform baseline was measured."
    return (
        f"<div class='scroll' tabindex='0' role='region' aria-label='Evaluation table'><table class='compare'>"
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div><p class='note'>{source}</p>"
    )


def _recipe(recipe: str | None) -> str:
    # Long recipes may break after their separators.
    breakable = escape(recipe).replace(",", ",<wbr>").replace(":", ":<wbr>") if recipe else ""
    return f"<small class='mono'>{breakable}</small>" if recipe else ""


def front(evidence: Mapping[str, Any]) -> str:
    """What stands where the front would be when a run has none."""
    if evidence.get("front"):
        return ""
    return "<p class='note'>This run kept no candidates beside its plan, so there is no front to show.</p>"


def agreement_section(evidence: Mapping[str, Any]) -> str:
    """Rank correlation and median ratio over the sampled candidates, with the place where they are drawn."""
    sampled = evidence.get("sampled")
    if not sampled:
        return (
            "<p class='note'>No single site was measured in this run, so predictions can be checked only for the "
            "plan as a whole.</p>"
        )
    rows = "".join(
        f"<tr><th scope='row'>{escape(group.label)}</th><td>{group.count}</td>"
        f"<td>{'–' if group.spearman is None else f'{group.spearman:.2f}'}</td>"
        f"<td>{'–' if group.median_ratio is None else significant(group.median_ratio, 3)}</td></tr>"
        for group in agreement(sampled)
    )
    return (
        "<div class='pair'><figure id='scatter' class='chart'></figure><div>"
        "<table class='small'><thead><tr><td></td><th scope='col'>Candidates</th><th scope='col'>Spearman</th>"
        f"<th scope='col'>Median ratio</th></tr></thead><tbody>{rows}</tbody></table>"
        "<p class='note'>Each point is one candidate put alone into the dense network. Ratio is measured ÷ predicted; "
        "the dashed lines mark a factor of two. Candidates whose measured rise is not positive cannot be drawn on a "
        "logarithmic scale, but count in the table.</p></div></div>"
    )


def winners(evidence: Mapping[str, Any]) -> str:
    """Bytes of the plan by family where several won sites, by encoder, by bits and by recipe."""
    sites = evidence["sites"]
    groups: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = []
    if len({site.get("family") for site in sites} - {None, "kept"}) > 1:
        groups.append(("By family", lambda s: s["family"]))
    groups += [
        ("By encoder", lambda s: encoder_of(s["recipe"])),
        ("By bits", lambda s: bits_of(s["recipe"], s["bpw"]) + " bits"),
        ("By recipe", lambda s: s["recipe"]),
    ]
    return "".join(f"<div><h3>{title}</h3>{_bars(sites, key)}</div>" for title, key in groups)


def _bars(sites: list[Mapping[str, Any]], key: Callable[[Mapping[str, Any]], str]) -> str:
    sums: dict[str, list[int]] = {}
    for site in sites:
        entry = sums.setdefault(key(site), [0, 0])
        entry[0] += site["bytes"]
        entry[1] += 1
    ordered = sorted(sums.items(), key=lambda item: (-item[1][0], item[0]))
    if len(ordered) > MOST_BARS:
        rest = [value for _, value in ordered[MOST_BARS - 1 :]]
        ordered = ordered[: MOST_BARS - 1] + [
            (f"{len(rest)} others", [sum(r[0] for r in rest), sum(r[1] for r in rest)])
        ]
    total, longest = max(1, sum(v[0] for _, v in ordered)), max([1, *(v[0] for _, v in ordered)])
    return (
        "<ul class='bars'>"
        + "".join(
            f"<li><span class='mono'>{escape(label)}</span><span class='figure'>"
            f"{megabytes(size)} · {size / total:.0%} · {count} {'site' if count == 1 else 'sites'}</span>"
            f"<span class='bar'><i style='width:{100 * size / longest:.1f}%'></i></span></li>"
            for label, (size, count) in ordered
        )
        + "</ul>"
    )


def coverage(evidence: Mapping[str, Any]) -> str:
    """Sites about which little was measured; nothing when there are none."""
    thin = [(site, reason) for site in evidence["sites"] if (reason := low_coverage(site))]
    if not thin:
        return ""
    rows = "".join(
        f"<tr><th scope='row' class='mono'>{escape(site['site'])}</th><td>{site['tokens']:,}</td>"
        f"<td class='words'>{escape(reason)}</td></tr>"
        for site, reason in thin
    )
    return (
        "<section aria-labelledby='coverage'><h2 id='coverage'>Low coverage</h2>"
        "<p class='lead'>Too little reached these sites to trust their statistics fully: they are shrunk towards a "
        "prior, or were not searched.</p><div class='scroll tall' tabindex='0' role='region' "
        "aria-label='Low coverage sites'><table class='small'><thead><tr><th scope='col'>Site</th>"
        f"<th scope='col'>Tokens</th><th scope='col' class='words'>Reason</th></tr></thead><tbody>{rows}</tbody>"
        "</table></div></section>"
    )


def reproduce(evidence: Mapping[str, Any]) -> str:
    """Commands, data with its splits, seconds by stage, and what it ran on."""
    parts = [_command("Run it again", evidence["command"])]
    if evidence.get("replan"):
        parts.append(_command("Plan for another budget, in seconds", evidence["replan"]))
    calibration = evidence["data"]["calibration"]
    splits = ", ".join(f"{name} {calibration[name]}" for name in ("fit", "judge", "steer") if name in calibration)
    facts = [
        ("Network", f"{evidence['network']['name']} ({evidence['network']['dense_dtype']})"),
        ("Fingerprint", evidence["network"].get("fingerprint")),
        ("Loss", f"{evidence['loss']['name']}, {evidence['loss']['unit']}"),
        ("Budget", _budget(evidence.get("budget"))),
        (
            "Calibration",
            f"{calibration['source']}: {calibration['sequences']:,} sequences, "
            f"{calibration['tokens']:,} tokens" + (f" ({splits})" if splits else ""),
        ),
        ("Evaluation", _held_out(evidence["data"].get("evaluation"))),
        ("Seed", evidence.get("seed")),
        ("Threads", evidence.get("threads")),
        ("Versions", ", ".join(f"{k} {v}" for k, v in sorted(evidence.get("versions", {}).items()))),
        ("Machine", evidence.get("machine")),
        ("Peak memory", megabytes(evidence["peak_memory"]) if evidence.get("peak_memory") else None),
        *((str(name), _check(value)) for name, value in sorted(evidence.get("checks", {}).items())),
        ("Written", evidence["created"]),
    ]
    listed = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(str(value))}</dd></div>"
        for label, value in facts
        if value not in (None, "")
    )
    return f"{''.join(parts)}<div class='pair'><dl class='facts'>{listed}</dl><div>{_stages(evidence)}</div></div>"


def _budget(budget: Mapping[str, Any] | None) -> str | None:
    return None if budget is None else f"{budget['text']} ({budget['bytes']:,} B)"


def _held_out(data: Mapping[str, Any] | None) -> str | None:
    if data is None:
        return None
    same = ", set aside from the calibration text" if data["same_source"] else ""
    return f"{data['source']}: {data['sequences']:,} sequences, {data['tokens']:,} tokens{same}"


def _check(value: Any) -> str:
    return "yes" if value is True else "NO" if value is False else str(value)


def _command(title: str, command: str) -> str:
    return (
        f"<div class='command'><h3>{title}</h3><button type='button' class='copy'>Copy</button>"
        f"<pre tabindex='0'><code>{escape(command)}</code></pre></div>"
    )


def _stages(evidence: Mapping[str, Any]) -> str:
    stages = {name: value for name, value in evidence["seconds"].items() if name != "total"}
    total = evidence["seconds"].get("total", sum(stages.values()))
    longest = max([1e-9, *stages.values()])
    bars = "".join(
        f"<li><span>{escape(name)}</span><span class='figure'>{duration(value)}</span>"
        f"<span class='bar'><i style='width:{max(0.0, 100 * value / longest):.1f}%'></i></span></li>"
        for name, value in stages.items()
    )
    return f"<h3>Time: {duration(total)}</h3><ul class='bars'>{bars}</ul>"
