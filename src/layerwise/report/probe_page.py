"""A probe's page: one HTML file with its pictures, every figure, and how it was measured. It loads nothing.

There is no script at all, and a content security policy says so. What comes from a network or a user is escaped.
"""

from __future__ import annotations

from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from layerwise.errors import InputError
from layerwise.probe.measurement import Column, Measurement
from layerwise.report.drawings import draw
from layerwise.report.figures import probe_value


def check_page(out: str, force: bool) -> Path:
    """The file to write, refused before the work where it cannot be written."""
    path = Path(out)
    if path.is_dir():
        raise InputError(f"{out} is a folder; give --out a file name such as probe.html")
    if path.exists() and not force:
        raise InputError(f"{out} exists; choose another name or give --force to replace it")
    if not path.absolute().parent.is_dir():
        raise InputError(f"the folder {path.absolute().parent} that is to hold {path.name} does not exist")
    return path


def write_page(path: Path, measurement: Measurement, command: str) -> None:
    """The page appears by one rename."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(render_probe(measurement, command), encoding="utf-8")
    beside.replace(path)


def render_probe(measurement: Measurement, command: str) -> str:
    """The page of this measurement as HTML text."""
    return Template(_template("probe.html")).substitute(
        style=_template("page.css") + _template("probe.css"),
        network=escape(measurement.network.rstrip("/").rpartition("/")[2] or measurement.network),
        architecture=escape(measurement.architecture),
        title=escape(measurement.title),
        summary=escape(measurement.summary),
        caution=escape(measurement.caution),
        pictures="\n".join(draw(p, i) for i, p in enumerate(measurement.pictures)),
        table=_table(measurement),
        legend=_legend(measurement),
        command=escape(command),
        facts=_facts(measurement),
    )


def _table(measurement: Measurement) -> str:
    head = "".join(f"<th scope='col'>{escape(c.name)}{_unit(c)}</th>" for c in measurement.columns)
    body = ""
    for row in measurement.rows:
        cells = "".join(
            f"<td>{escape(probe_value(value, column.digits))}</td>"
            for value, column in zip(row.values, measurement.columns, strict=True)
        )
        place = escape(row.place).replace(".", ".<wbr>")
        body += f"<tr><th scope='row' class='mono'>{place}</th>{cells}</tr>"
    wide = 14 + 4 * len(measurement.columns)
    return (
        f"<table class='small figures' style='min-width:{wide}em'><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def _unit(column: Column) -> str:
    return f"<small>{escape(column.unit)}</small>" if column.unit else ""


def _legend(measurement: Measurement) -> str:
    return "".join(
        f"<div><dt>{escape(c.name)}</dt><dd>{escape(c.help)}</dd></div>" for c in measurement.columns if c.help
    )


def _facts(measurement: Measurement) -> str:
    facts = [("Probe", measurement.probe), *((k.capitalize(), v) for k, v in measurement.data.items())]
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(f'{v:,}' if isinstance(v, int) else str(v))}</dd></div>"
        for name, v in facts
    )


def _template(name: str) -> str:
    return (files("layerwise.report") / "templates" / name).read_text(encoding="utf-8")
