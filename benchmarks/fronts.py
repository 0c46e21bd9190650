"""Fronts of bytes against loss: what lies between two measured points, and a picture of many of them."""

from __future__ import annotations

import bisect
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

Point = tuple[float, float]  # (bytes or bits a weight, loss)

PANEL = (430, 400)  # of one plot, in units of the drawing
EDGE = (52, 34, 128, 44)  # left, top, right, bottom; names stand on the right
PALETTE = ("#c2410c", "#0f766e", "#7c3aed", "#b91c1c", "#4d7c0f", "#be185d", "#0369a1", "#a16207", "#475569", "#15803d")
STYLE = (
    "text{font:11px sans-serif;fill:#222}.title{font-weight:bold;font-size:13px}.grid{stroke:#ddd}"
    ".line{fill:none;stroke-width:1.2;opacity:.8}.ours{stroke-width:3.2;opacity:1}"
)


def front_of(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both, by ascending size; a loss of zero has no logarithm and is left out."""
    kept: list[Point] = []
    for size, loss in sorted(points):
        if loss > 0 and (not kept or loss < kept[-1][1]):
            kept.append((size, loss))
    return kept


def size_at(points: Sequence[Point], loss: float) -> float | None:
    """The size at which a front reaches a loss, between two of its points on a straight line of log loss; else None."""
    front = front_of(points)
    for (small, worse), (large, better) in itertools.pairwise(front):
        if better <= loss <= worse:
            share = math.log(worse / loss) / math.log(worse / better)
            return small + share * (large - small)
    return None


def loss_at(points: Sequence[Point], size: float) -> float | None:
    """The loss of a front at a size between two of its points, on a straight line of log loss; else None."""
    front = front_of(points)
    sizes = [s for s, _ in front]
    place = bisect.bisect_left(sizes, size)
    if place < len(front) and sizes[place] == size:
        return front[place][1]
    if not 0 < place < len(front):
        return None
    (small, worse), (large, better) = front[place - 1], front[place]
    return worse * (better / worse) ** ((size - small) / (large - small))


def picture(title: str, panels: Sequence[tuple[str, Mapping[str, Sequence[Point]]]], ours: str, axis: str) -> str:
    """An SVG of one plot a panel, side by side on the same axes: loss (logarithmic) over size, a line a method.

    ours: the name of the line that is drawn thick, in every panel that has it.
    """
    everything = [p for _, lines in panels for points in lines.values() for p in points if p[1] > 0]
    if not everything:
        raise ValueError("there is no point to draw")
    low, high = (f(size for size, _ in everything) for f in (min, max))
    least, most = (f(math.log10(loss) for _, loss in everything) for f in (min, max))
    high, most = max(high, low + 1e-9), max(most, least + 1e-9)
    width, height = PANEL[0] * len(panels), PANEL[1] + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
        f'<rect width="{width}" height="{height}" fill="#fff"/>'
        f'<text class="title" x="{EDGE[0]}" y="16">{escape(title)}</text>'
    ]
    for place, (heading, lines) in enumerate(panels):
        parts.append(f'<g transform="translate({place * PANEL[0]} 24)">')
        parts.append(_panel(heading, lines, ours, axis, (low, high), (least, most)))
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def save_picture(
    file: Path,
    page: Path | None,
    title: str,
    panels: Sequence[tuple[str, Mapping[str, Sequence[Point]]]],
    ours: str,
    axis: str,
) -> None:
    """Write the SVG, and a link to it at the end of a Markdown page."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(picture(title, panels, ours, axis), encoding="utf-8")
    if page is not None:
        with page.open("a", encoding="utf-8") as out:
            out.write(f"\n![{title}]({os.path.relpath(file, page.parent)})\n")


def _panel(
    heading: str,
    lines: Mapping[str, Sequence[Point]],
    ours: str,
    axis: str,
    sizes: tuple[float, float],
    losses: tuple[float, float],
) -> str:
    left, top, right, bottom = EDGE
    inner = PANEL[0] - left - right, PANEL[1] - top - bottom

    def x(size: float) -> float:
        return left + (size - sizes[0]) / (sizes[1] - sizes[0]) * inner[0]

    def y(loss: float) -> float:
        return top + (losses[1] - math.log10(loss)) / (losses[1] - losses[0]) * inner[1]

    out = [f'<text x="{left}" y="{top - 10}">{escape(heading)}</text>']
    for size in _ticks(*sizes):
        out.append(f'<line class="grid" x1="{x(size):.1f}" x2="{x(size):.1f}" y1="{top}" y2="{top + inner[1]}"/>')
        out.append(f'<text x="{x(size):.1f}" y="{top + inner[1] + 15}" text-anchor="middle">{size:g}</text>')
    for loss in _decades(*losses):
        out.append(f'<line class="grid" x1="{left}" x2="{left + inner[0]}" y1="{y(loss):.1f}" y2="{y(loss):.1f}"/>')
        out.append(f'<text x="{left - 5}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:g}</text>')
    out.append(f'<text x="{left + inner[0] / 2}" y="{PANEL[1] - 10}" text-anchor="middle">{escape(axis)}</text>')
    labels = []
    drawn = {name: sorted(p for p in points if p[1] > 0) for name, points in lines.items()}
    for index, (name, points) in enumerate((n, p) for n, p in drawn.items() if p):
        colour, kind = ("#1d4ed8", "line ours") if name == ours else (PALETTE[index % len(PALETTE)], "line")
        path = " ".join(f"{x(size):.1f},{y(loss):.1f}" for size, loss in points)
        dots = "".join(f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="2" fill="{colour}"/>' for s, v in points)
        out.append(f'<polyline class="{kind}" stroke="{colour}" points="{path}"/>{dots}')
        labels.append((y(points[-1][1]), x(points[-1][0]), name, colour))
    for (at, end, name, colour), place in zip(sorted(labels), _apart([a for a, *_ in sorted(labels)]), strict=True):
        weight = ' font-weight="bold"' if name == ours else ""
        edge = left + inner[0]
        out.append(
            f'<path d="M{end:.1f} {at:.1f}L{edge + 10} {place:.1f}" stroke="{colour}" opacity=".35" fill="none"/>'
        )
        out.append(f'<text x="{edge + 13}" y="{place + 4:.1f}"{weight} style="fill:{colour}">{escape(name)}</text>')
    return "\n".join(out)


def _apart(wanted: Sequence[float], gap: float = 12.0) -> list[float]:
    """Heights of labels, ascending, none nearer to the one above than ``gap``, all moved up if they run out below."""
    placed: list[float] = []
    for at in wanted:
        placed.append(max(at, placed[-1] + gap) if placed else at)
    floor = float(PANEL[1] - EDGE[3])
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], floor)
        floor = placed[i] - gap
    return placed


def _ticks(low: float, high: float) -> list[float]:
    step = next(step for step in (0.1, 0.2, 0.5, 1.0) if high - low <= 8 * step or step == 1.0)
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 6) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    marks = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    return [m for m in marks if low - 1e-9 <= math.log10(m) <= high + 1e-9]
