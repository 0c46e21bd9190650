"""Generated pages of the guide: techniques and their options, verbs and theirs, and the measured evidence.

A hook of mkdocs (``hooks:`` in ``mkdocs.yml``): the pages are made from the package while the guide is built, so none
is stale. ``python docs/reference.py FOLDER`` writes them as files.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGES = ("techniques.md", "commands.md", "evidence.md")


def pages() -> dict[str, str]:
    """Page name -> Markdown."""
    return dict(zip(PAGES, (techniques(), commands(), evidence()), strict=True))


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs when it has listed ``docs/``."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def techniques() -> str:
    """Every registered technique by role: paper, what it is, what it needs, its options."""
    from layerwise.evidence.rows import read_evidence
    from layerwise.technique import find, names

    lines = [
        "# Techniques",
        "",
        "Generated from the registry. A recipe names techniques with options, `awq+gptq:bits=3,group=64`: rewrites",
        "first, then one encoder. *Measured* links to a technique's evidence rows.",
    ]
    found = [find(name) for name in names()]
    for role in dict.fromkeys(cls.role for cls in found):
        members = [cls for cls in found if cls.role == role]
        lines += ["", f"## Role: {role}", ""]
        for cls in members:
            lines += ["", f"### {cls.name}", "", first_sentence(cls), ""]
            needs = ", ".join(sorted(cls.needs)) or "nothing"
            lines += [f"Paper: {cls.paper}. Family: {cls.family}. Needs measured: {needs}.", ""]
            if read_evidence(cls.name) is not None:
                lines += [f"[Measured](evidence.md#{cls.name}).", ""]
            lines += list(option_table(cls))
    return "\n".join(lines) + "\n"


def first_sentence(cls: type) -> str:
    return " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())


def option_table(cls: type) -> Iterator[str]:
    options = dataclasses.fields(cls)
    if not options:
        yield "No options."
        return
    yield from ("| option | default | may be | meaning |", "|---|---|---|---|")
    for field in options:
        yield f"| `{field.name}` | `{written(field.default)}` | {allowed(field)} | {field.metadata.get('help', '')} |"


def allowed(field: dataclasses.Field[Any]) -> str:
    limits = field.metadata
    if isinstance(field.default, bool):
        return "`true`, `false`"
    if limits.get("choices") is not None:
        return ", ".join(f"`{choice}`" for choice in limits["choices"])
    low, high = limits.get("minimum"), limits.get("maximum")
    if low is None and high is None:
        return ""
    return f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} to {high}"


def written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def commands() -> str:
    """Every verb with its arguments and options, as ``--help`` tells them."""
    lines = ["# Commands", "", "Generated from the command line itself. `-h` after any verb prints the same."]
    for words, command in verbs():
        lines += ["", f"## layerwise {words}", "", " ".join((command.help or "").split()), ""]
        rows = [row for row in map(parameter_row, command.params) if row]
        if rows:
            lines += ["| argument or option | default | meaning |", "|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def verbs() -> Iterator[tuple[str, Any]]:
    import typer.main

    from layerwise.cli.main import app

    def below(group: Any, before: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from below(command, (*before, name))
            else:
                yield " ".join((*before, name)), command

    yield from below(typer.main.get_command(app), ())


def parameter_row(parameter: Any) -> str:
    if "--help" in parameter.opts:
        return ""
    if parameter.param_type_name == "argument":
        return f"| `{parameter.metavar or parameter.name.upper()}` | | {parameter.help or ''} |"
    default = parameter.default
    shown = "" if default is None or default is False or callable(default) or default == () else f"`{default}`"
    shown = "required" if parameter.required else shown
    return f"| `{parameter.opts[0]}` | {shown} | {(parameter.help or '').replace('|', '/')} |"


def evidence() -> str:
    """Every committed evidence row, one table a technique."""
    from layerwise.evidence.rows import read_evidence, techniques_with_evidence

    lines = [
        "# Evidence",
        "",
        "Generated from the files in `src/layerwise/evidence/`. A ratio below one says that the setting loses less",
        "than its baseline; rows that lose are kept. Values are means over calibration seeds, ± half their range. How",
        "they are made: [Reproduce evidence](reproduce-evidence.md).",
    ]
    for name in techniques_with_evidence():
        found = read_evidence(name)
        if found is None or not found.rows:
            continue
        lines += ["", f"## {name}", ""]
        for command in dict.fromkeys(row.command for row in found.rows):
            rows = [row for row in found.rows if row.command == command]
            seeds = ", ".join(map(str, rows[0].seeds))
            lines += [f"{rows[0].metric} on {rows[0].network}, {rows[0].data}; seeds {seeds}: `{command}`", ""]
            lines += [
                "| setting | bytes | loss | baseline | its bytes | its loss | ratio |",
                "|---|--:|--:|---|--:|--:|--:|",
            ]
            for row in rows:
                ratio = "–" if row.ratio is None else f"{row.ratio:.3f}"
                lines.append(
                    f"| `{row.setting}` | {row.bytes:,} | {row.value:.4g} ± {row.spread:.2g} | {row.baseline.recipe} "
                    f"| {row.baseline.bytes:,} | {row.baseline.value:.4g} | {ratio} |"
                )
            lines.append("")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")
