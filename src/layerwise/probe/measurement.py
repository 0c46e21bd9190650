"""What a probe returns: figures in rows, a sentence computed from them, and what is to be drawn.

Plain values that import nothing of the project, so that every folder may name them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Value = float | int | str | None  # None: it could not be measured here


@dataclass(frozen=True)
class Column:
    """A figure every row has. ``detail`` columns are left out on the terminal and kept everywhere else."""

    name: str
    unit: str = ""
    help: str = ""
    digits: int = 3
    detail: bool = False


@dataclass(frozen=True)
class Row:
    """The figures of one place: a site or a block, by its module path."""

    place: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class HeatMap:
    """One value per (row, column), coloured between the least and the greatest; None is drawn as unknown."""

    title: str
    note: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    unit: str
    corner: str = "block"
    empty: str = "not measured"  # what a missing value means; nothing is drawn where this is empty


@dataclass(frozen=True)
class Bars:
    """One bar per label, with a second figure (the control) as a mark on the same scale."""

    title: str
    note: str
    labels: tuple[str, ...]
    values: tuple[float, ...]
    unit: str
    marks: tuple[float, ...] = ()
    marked: str = ""  # what the marks are


@dataclass(frozen=True)
class Curve:
    """Points ``(x, y)`` with a fitted line and a control, in one small panel; both axes logarithmic."""

    title: str
    points: tuple[tuple[float, float], ...]
    line: tuple[tuple[float, float], ...] = ()
    control: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Curves:
    """Small panels side by side."""

    title: str
    note: str
    across: str
    up: str
    panels: tuple[Curve, ...]
    dots: str  # what points, line and control are
    line: str = ""
    control: str = ""


Picture = HeatMap | Bars | Curves


@dataclass(frozen=True)
class Compared:
    """A figure of the probe's own idea beside the same without it; smaller is better."""

    setting: str
    value: float
    baseline: str
    other: float
    metric: str


@dataclass(frozen=True)
class Measurement:
    """What a probe found in a network. Rows are in order of execution, one per site or block.

    summary: one sentence computed from the figures. caution: what the figures cannot say. data: what text was read,
    seeds and settings. compared: what its evidence is, where it measures the network run in another way.
    """

    probe: str
    title: str
    network: str
    architecture: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    summary: str
    caution: str
    pictures: tuple[Picture, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    compared: tuple[Compared, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.values) != len(self.columns):
                raise ValueError(f"{row.place} has {len(row.values)} values for {len(self.columns)} columns")

    def column(self, name: str) -> dict[str, Value]:
        """Place -> value of one column."""
        at = [c.name for c in self.columns].index(name)
        return {row.place: row.values[at] for row in self.rows}

    def as_json(self) -> dict[str, Any]:
        """Everything but the pictures, which are drawn from the same figures."""
        names = [c.name for c in self.columns]
        return {
            "probe": self.probe, "title": self.title, "network": self.network, "class": self.architecture,
            "summary": self.summary, "caution": self.caution, "data": dict(self.data),
            "columns": [{"name": c.name, "unit": c.unit, "help": c.help} for c in self.columns],
            **({"compared": [vars(c) for c in self.compared]} if self.compared else {}),
            "rows": [{"place": r.place, **dict(zip(names, r.values, strict=True))} for r in self.rows],
        }  # fmt: skip


def by_block(blocks: Sequence[str], values: Mapping[str, float | None]) -> tuple[tuple[str, ...], ...] | None:
    """Paths relative to a block, in the order they are met; None where no place lies in a block."""
    found: dict[str, tuple[str, ...]] = {}
    for place in values:
        for block in blocks:
            if place.startswith(block + "."):
                found.setdefault(inner := place.removeprefix(block + "."), tuple(inner.split(".")))
    return tuple(found.values()) or None


def heat_by_block(
    title: str, note: str, unit: str, blocks: Sequence[str], values: Mapping[str, float | None]
) -> HeatMap | None:
    """A heat map of block × linear, columns named by the shortest ending that tells them apart."""
    inner = by_block(blocks, values)
    if inner is None:
        return None
    grid = tuple(tuple(values.get(".".join((block, *path))) for path in inner) for block in blocks)
    return HeatMap(title, note, tuple(b.rpartition(".")[2] for b in blocks), short_names(inner), grid, unit)


def short_names(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The shortest ending of each path that no other path ends in, and the whole path where there is none."""

    def short(path: tuple[str, ...]) -> str:
        for length in range(1, len(path) + 1):
            if sum(other[-length:] == path[-length:] for other in paths) == 1:
                return ".".join(path[-length:])
        return ".".join(path)

    return tuple(short(path) for path in paths)
