"""How the benchmarks say what they found: aligned text, JSON rows, and Markdown beside the command that gives it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Table:
    """Cells that are ready to print; columns named in ``text`` are flushed left."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: frozenset[str] = frozenset()

    @classmethod
    def of(cls, title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> Table:
        """A table of the named keys of dictionaries; all keys of the first row by default."""
        names = tuple(columns or (rows[0] if rows else ()))
        text = frozenset(n for n in names if any(isinstance(row.get(n), str) for row in rows))
        return cls(title, names, tuple(tuple(cell(row.get(n)) for n in names) for row in rows), text)

    def plain(self) -> str:
        widths = [max(len(line[i]) for line in (self.columns, *self.rows)) for i in range(len(self.columns))]

        def line(cells: Sequence[str]) -> str:
            padded = [
                cell.ljust(width) if name in self.text else cell.rjust(width)
                for cell, width, name in zip(cells, widths, self.columns, strict=True)
            ]
            return "  ".join(padded).rstrip()

        rule = "-" * (sum(widths) + 2 * len(widths) - 2)
        return "\n".join([self.title, line(self.columns), rule, *map(line, self.rows)])

    def markdown(self) -> str:
        marks = [":--" if name in self.text else "--:" for name in self.columns]
        lines = [self.columns, marks, *self.rows]
        return f"**{self.title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: Any) -> str:
    """A value as a person reads it: four significant digits, thousands apart, a dash for what does not apply."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows and the summary here")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the tables here, with the command")


def publish(given: argparse.Namespace, tables: Sequence[Table], values: Mapping[str, Any]) -> None:
    """Print the tables; write ``values`` as JSON and the tables as Markdown where the user asked for them."""
    for table in tables:
        print(table.plain() + "\n")
    found = {"command": command(), "machine": machine(), "versions": versions(), **values}
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if given.markdown:
        given.markdown.parent.mkdir(parents=True, exist_ok=True)
        given.markdown.write_text(page(tables), encoding="utf-8")


def page(tables: Sequence[Table]) -> str:
    """A Markdown page: the command, what it ran on, the tables."""
    ran = ", ".join(f"{name} {version}" for name, version in versions().items())
    head = f"```\n{command()}\n```\n\n{machine()}; {ran}"
    return "\n\n".join([head, *(t.markdown() for t in tables)]) + "\n"


def command() -> str:
    """The command as it was typed, without the two options that say where to write."""
    script = Path(sys.argv[0])
    if script.is_absolute() and ROOT in script.parents:
        script = script.relative_to(ROOT)
    kept, skip = [], False
    for word in sys.argv[1:]:
        if skip:
            skip = False
        elif word in ("--json", "--markdown"):
            skip = True
        elif not word.startswith(("--json=", "--markdown=")):
            kept.append(word)
    return shlex.join(["python", script.as_posix(), *kept])


def machine() -> str:
    return f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    from layerwise.engine.machine import versions

    return versions()
