"""Which techniques are registered for which paper, read from their source: no technique is imported to list it."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from layerwise.papers.catalogue import normal, paper_named
from layerwise.technique import technique_files

PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Registered:
    """A technique's file as its source declares it."""

    name: str
    family: str
    role: str  # name of its base class, in words
    paper: str  # as the decorator writes it
    summary: str  # first line of the class's docstring
    left_out: str = ""  # what of the paper is not here, as the decorator writes it

    @property
    def key(self) -> str:
        """What techniques of one paper share: the paper's short name in the catalogue, else the name as written."""
        found = paper_named(self.paper)
        return normal(found.short if found else self.paper)


@cache
def registered() -> tuple[Registered, ...]:
    """Every registered technique, by name."""
    found = []
    for name, module in sorted(technique_files().items()):
        path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
        found.append(read_declaration(name, path))
    return tuple(found)


def read_declaration(name: str, path: Path) -> Registered:
    """The declaration in a technique file. Raises ``RuntimeError`` where ``@technique(paper="…")`` is not literal."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for call in node.decorator_list:
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "technique"):
                continue
            written = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
            paper, left_out = written.get("paper"), written.get("left_out", "")
            if isinstance(paper, str):
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                summary = (ast.get_docstring(node) or "").partition("\n")[0]
                role = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", (bases or [""])[0]).lower()
                return Registered(name, path.parent.name, role, paper, summary, str(left_out))
    raise RuntimeError(f"{path.name} has no class decorated with @technique(paper=...) where the paper is a text")


@cache
def by_paper() -> Mapping[str, tuple[Registered, ...]]:
    """Normalised name of a paper -> the techniques registered for it."""
    groups: dict[str, list[Registered]] = {}
    for technique in registered():
        groups.setdefault(technique.key, []).append(technique)
    return {key: tuple(group) for key, group in groups.items()}


def command_of(technique: Registered) -> str | None:
    """The command that uses a technique, by its role; None where no verb takes the role yet."""
    name = technique.name
    return {
        "encoder": f"layerwise compress MODEL OUT --uniform {name}",
        "rewrite": f"layerwise compress MODEL OUT --uniform {name}+rtn",
        "network rewrite": f"layerwise compress MODEL OUT --budget 4bpw --rewrite {name}",
        "tuner": f"layerwise compress MODEL OUT --budget 4bpw --tune {name}",
        "probe": f"layerwise probe MODEL {name}",
        "distiller": f"layerwise tune STUDENT OUT --teacher MODEL --technique {name} --calibrate TEXT",
        "blueprint": f"layerwise train {name} OUT --text TEXT",
        "sparsifier": f"layerwise bench {name}",
        "search": f"layerwise search {name} OUT --images FILE",
        "network surgeon": f"layerwise reshape MODEL OUT --surgeon {name}",
        "generator": f"layerwise generate MODEL --prompt TEXT --method {name}",
        "allocator": f"layerwise compress MODEL OUT --budget 4bpw --allocator {name}",
    }.get(technique.role)
