"""Pictures of a probe as markup: heat maps as tables, bars and curves as inline SVG. No script, nothing loaded.

Colours come from the page's own classes, so that one markup serves light and dark. Every figure that a colour or a
length stands for is also in the markup as text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from layerwise.probe.measurement import Bars, Curve, Curves, HeatMap, Picture
from layerwise.report.figures import significant

STEPS = 9  # colour classes q0 … q8
PANEL = (340, 230)  # width and height of a panel of curves, in units of the drawing
EDGE = (46, 14, 14, 40)  # left, top, right, bottom of a panel


def draw(picture: Picture, index: int) -> str:
    """One picture as a section of the page."""
    if isinstance(picture, HeatMap):
        body = _heat(picture, f"picture-{index}")
    elif isinstance(picture, Bars):
        body = _bars(picture)
    else:
        body = _curves(picture)
    return (
        f"<section aria-labelledby='picture-{index}'><h2 id='picture-{index}'>{escape(picture.title)}</h2>"
        f"<p class='lead'>{escape(picture.note)}</p>{body}</section>"
    )


# ---------------------------------------------------------------- heat maps


def _heat(heat: HeatMap, label: str) -> str:
    known = [v for row in heat.values for v in row if v is not None]
    if not known:
        return "<p class='note'>Nothing could be measured here.</p>"
    low, high = min(known), max(known)
    # A long name may break after its dots and underscores.
    head = "".join(f"<th scope='col'><span>{_breakable(name)}</span></th>" for name in heat.columns)
    body = ""
    for name, row in zip(heat.rows, heat.values, strict=True):
        cells = "".join(
            _cell(value, _class(value, low, high), f"{heat.corner} {name}, {column}", heat.empty)
            for value, column in zip(row, heat.columns, strict=True)
        )
        body += f"<tr><th scope='row'>{escape(name)}</th>{cells}</tr>"
    tall = "tallrows" if len(heat.rows) <= 10 else ""
    upright = "upright" if max(map(len, heat.columns)) <= 3 else ""  # short names need no turning on a narrow screen
    ramp = "".join(f"<i class='q{i}'></i>" for i in range(STEPS))
    table = (
        f"<table class='{tall} {upright}' style='--least:{3 + 2.5 * len(heat.columns):.1f}em'><thead><tr>"
        f"<th class='first'>{escape(heat.corner)}</th>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
    return (
        f"<div class='map heat' data-mode='bits'><div class='legend'><span class='ramp'>{_short(low)}"
        f"<span>{ramp}</span>{_short(high)} {escape(heat.unit)}</span></div>"
        f"<div class='scroll' tabindex='0' role='region' aria-labelledby='{label}'>{table}</div></div>"
    )


def _cell(value: float | None, shade: str, place: str, empty: str) -> str:
    if value is None:
        return f"<td class='cell unknown' title='{escape(place)}: {escape(empty)}'></td>" if empty else "<td></td>"
    return f"<td class='cell {shade}' title='{escape(place)}: {significant(value, 4)}'>{_short(value)}</td>"


def _class(value: float | None, low: float, high: float) -> str:
    if value is None:
        return "unknown"
    return f"q{min(STEPS - 1, int(STEPS * (value - low) / (high - low))) if high > low else STEPS // 2}"


def _short(value: float) -> str:
    """``0.064`` -> ``.064``: a cell is narrow."""
    text = significant(value, 2 if abs(value) < 10 else 3)
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def _breakable(name: str) -> str:
    return escape(name).replace(".", ".<wbr>").replace("_", "_<wbr>")


# ---------------------------------------------------------------- bars


def _bars(bars: Bars) -> str:
    """Rows of HTML rather than one drawing: they keep their letters' size on a narrow screen."""
    longest = max([0.0, *bars.values, *bars.marks]) or 1.0
    rows = ""
    for i, (label, value) in enumerate(zip(bars.labels, bars.values, strict=True)):
        mark, said = "", ""
        if bars.marks:
            at = 100 * bars.marks[i] / longest
            mark = f"<rect class='mark' x='{max(0.0, at - 0.4):.2f}%' y='0' width='3' height='14'/>"
            said = f" <small>{significant(bars.marks[i])}</small>"
        rows += (
            f"<li><span>{escape(label)}</span><svg width='100%' height='14' role='img' aria-label='"
            f"{escape(label)}: {significant(value)}'><rect class='track' width='100%' height='14' rx='3'/>"
            f"<rect class='value' width='{max(0.0, 100 * value / longest):.2f}%' height='14' rx='3'/>{mark}</svg>"
            f"<span class='figure'><b>{significant(value)}</b>{said}</span></li>"
        )
    legend = f"<span><i class='swatch value'></i>{escape(bars.unit)}</span>"
    if bars.marks:
        legend += f"<span><i class='swatch mark'></i>{escape(bars.marked)}</span>"
    return f"<div class='legend'>{legend}</div><ul class='levels'>{rows}</ul>"


# ---------------------------------------------------------------- curves


def _curves(curves: Curves) -> str:
    points = [p for c in curves.panels for p in (*c.points, *c.control)]
    across, up = _range([x for x, _ in points]), _range([y for _, y in points])
    panels = "".join(f"<figure class='chart'>{_panel(c, across, up, curves)}</figure>" for c in curves.panels)
    legend = f"<span><i class='swatch dots'></i>{escape(curves.dots)}</span>"
    legend += f"<span><i class='swatch line'></i>{escape(curves.line)}</span>" if curves.line else ""
    legend += f"<span><i class='swatch faint'></i>{escape(curves.control)}</span>" if curves.control else ""
    return f"<div class='legend'>{legend}</div><div class='panels'>{panels}</div>"


def _panel(curve: Curve, across: tuple[float, float], up: tuple[float, float], curves: Curves) -> str:
    (width, height), (left, top, right, bottom) = PANEL, EDGE
    x = _scale(across, left, width - right)
    y = _scale(up, height - bottom, top)
    grid = ""
    for power in _powers(across):
        at = x(10.0**power)
        grid += f"<line class='grid' x1='{at:.1f}' y1='{top}' x2='{at:.1f}' y2='{height - bottom}'/>"
        grid += f"<text x='{at:.1f}' y='{height - bottom + 15}' text-anchor='middle'>{_power(power)}</text>"
    for power in _powers(up):
        at = y(10.0**power)
        grid += f"<line class='grid' x1='{left}' y1='{at:.1f}' x2='{width - right}' y2='{at:.1f}'/>"
        grid += f"<text x='{left - 6}' y='{at + 4:.1f}' text-anchor='end'>{_power(power)}</text>"
    words = f"<text x='{(left + width - right) / 2:.0f}' y='{height - 6}' text-anchor='middle'>{escape(curves.across)}"
    words += f"</text><text transform='translate(11 {(top + height - bottom) / 2:.0f}) rotate(-90)' "
    words += f"text-anchor='middle'>{escape(curves.up)}</text>"
    dots = "".join(f"<circle class='dot' cx='{x(a):.1f}' cy='{y(b):.1f}' r='2.2'/>" for a, b in curve.points)
    control = _path(curve.control, x, y, "control")
    name, _, figure = curve.title.partition(" · ")
    return (
        f"<figcaption><span class='mono'>{_breakable(name)}</span> <b>{escape(figure)}</b></figcaption>"
        f"<svg viewBox='0 0 {width} {height}' role='img' aria-label='{escape(curve.title)}'>{grid}{words}"
        f"{control}{dots}{_path(curve.line, x, y, 'fit')}</svg>"
    )


def _path(
    points: Sequence[tuple[float, float]], x: Callable[[float], float], y: Callable[[float], float], kind: str
) -> str:
    if not points:
        return ""
    listed = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
    return f"<polyline class='{kind}' points='{listed}'/>"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Decimal logarithms of the ends, with a little room."""
    low, high = math.log10(min(values)), math.log10(max(values))
    room = max(0.05, 0.03 * (high - low))
    return low - room, high + room


def _scale(ends: tuple[float, float], start: float, stop: float) -> Callable[[float], float]:
    return lambda value: start + (stop - start) * (math.log10(value) - ends[0]) / (ends[1] - ends[0])


def _powers(ends: tuple[float, float]) -> range:
    """Powers of ten inside, at most six."""
    low, high = math.ceil(ends[0]), math.floor(ends[1])
    return range(low, high + 1, max(1, math.ceil((high - low + 1) / 6)))


def _power(power: int) -> str:
    return f"{10.0**power:g}" if -3 <= power <= 4 else f"1e{power}"
