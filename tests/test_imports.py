"""The import rules of ARCHITECTURE.md, read from the source: who may use whom, and what must stay out of where."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "layerwise"

TECHNIQUE_FOLDERS = ("quantize", "prune", "factorize", "depth", "normalize", "merge", "tune", "distill", "nas")
EVERYTHING = frozenset({"*"})

# Folder (or top-level file) -> what of the project it may import when it runs. `errors` and a folder itself always.
ALLOWED: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "technique": frozenset(),
    "roles": frozenset({"technique"}),
    "recipe": frozenset({"technique", "roles"}),
    "kernels": frozenset(),
    "engine": frozenset(),
    "network": frozenset(),
    "loss": frozenset({"network"}),
    "calibrate": frozenset({"network", "loss"}),
    "encoding": frozenset({"kernels"}),
    "sensitivity": frozenset({"technique", "roles", "calibrate"}),
    "plan": frozenset({"technique", "roles", "recipe", "sensitivity", "encoding"}),
    **dict.fromkeys(TECHNIQUE_FOLDERS, frozenset({"technique", "roles", "network", "calibrate", "loss", "encoding"})),
    "generate": frozenset({"technique", "roles", "network", "kernels"}),
    "probe": frozenset({"technique", "roles", "network", "calibrate"}),
    "blueprints": frozenset({"technique", "roles", "network", "encoding"}),
    "evaluate": frozenset({"network", "encoding", "plan"}),
    "report": frozenset({"network", "encoding", "plan"}),
    "export": frozenset({"network", "encoding", "plan"}),
    "papers": frozenset({"technique", "roles"}),
    "evidence": frozenset(),
    "acts": EVERYTHING,  # an act works over several folders, and on what earlier acts returned
    "jobs": EVERYTHING,
    "compress": EVERYTHING,
    "library": EVERYTHING,
    "cli": EVERYTHING,
    "trials": EVERYTHING,  # one file a kind of technique: what `bench` measures it by
    "__init__": EVERYTHING,
    "__main__": EVERYTHING,
}

# Widened on purpose; ARCHITECTURE.md gives the reasons.
WIDENED: dict[str, frozenset[str]] = {
    # packed modules hold a stored form and, where it has one, its kernel
    "network": frozenset({"encoding", "kernels"}),  # a network opened with some of its weights in stored form
    "calibrate": frozenset({"engine"}),  # the passes write the journal and say how far they are
    # a query is encoded by a network in stored form; a paper's evidence is shown beside it
    "papers": frozenset({"network", "evidence"}),
    # rounding with error feedback, for factors and for what they leave over; a surgeon says how far it is
    "factorize": frozenset({"quantize", "engine"}),
    **dict.fromkeys(("prune", "depth"), frozenset({"engine"})),  # surgeons of whole networks say how far they are
    "generate": frozenset({"engine"}),  # a method that learns says how far it is
    "evaluate": frozenset({"loss", "calibrate"}),  # the same loss and batches that were calibrated on
}
# Files of plain values, which import nothing of the project, so that naming them makes no cycle: open to every folder.
VALUES = {"layerwise.calibrate.statistics", "layerwise.probe.measurement"}
# The compositions: the main job, the acts one by one for the library, and the jobs of the other verbs. Only the outside
# knows them, and the trials, which do a job to measure it.
COMPOSITIONS = {"compress", "library", "jobs"}
WHO_MAY_COMPOSE = {*COMPOSITIONS, "trials", "cli", "__init__", "__main__"}

# What the verbs may use besides the project and the standard library: parse, call, print.
CLI_LIBRARIES = {"typer", "click", "rich"}
NUMERIC = {"torch", "transformers", "numpy", "scipy", "numba", "safetensors", "tokenizers", "huggingface_hub"}


@dataclass(frozen=True)
class Import:
    path: Path
    line: int
    target: str  # dotted, absolute
    types_only: bool

    @property
    def owner(self) -> str:
        first = self.path.relative_to(PACKAGE).parts[0]
        return first.removesuffix(".py")

    @property
    def area(self) -> str:
        """The folder or top-level file of the project that is imported; empty for the package itself."""
        return (self.target.split(".") + [""])[1]

    def __str__(self) -> str:
        return f"{self.path.relative_to(PACKAGE)}:{self.line} imports {self.target}"


def imports_of(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            targets = [_with_submodule(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for target in targets:
            yield Import(path, node.lineno, target, id(node) in guarded)


def _with_submodule(module: str, name: str) -> str:
    """``from layerwise.quantize import gptq`` names a file, ``from layerwise.errors import InputError`` a value."""
    if module.split(".")[0] != "layerwise":
        return module
    below = PACKAGE.joinpath(*module.split(".")[1:], name)
    return f"{module}.{name}" if below.is_dir() or below.with_suffix(".py").is_file() else module


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


ALL = [found for path in sources() for found in imports_of(path)]
INSIDE = [found for found in ALL if found.target.split(".")[0] == "layerwise"]


def technique_stems() -> dict[str, Path]:
    return {
        ".".join(("layerwise", *path.relative_to(PACKAGE).with_suffix("").parts)): path
        for path in sources()
        if "\n@technique(" in path.read_text(encoding="utf-8")
    }


def may_import(owner: str) -> frozenset[str]:
    return ALLOWED[owner] | WIDENED.get(owner, frozenset())


def test_every_folder_and_top_level_file_has_a_rule() -> None:
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in sources()}
    assert parts <= set(ALLOWED), f"not in the table of import rules: {sorted(parts - set(ALLOWED))}"


def test_the_table_has_no_cycle() -> None:
    graphlib.TopologicalSorter({part: may_import(part) - EVERYTHING for part in ALLOWED}).prepare()


def test_folders_import_only_what_the_table_allows() -> None:
    broken = set()
    for found in INSIDE:
        allowed = may_import(found.owner)
        # A type has no cost and makes no cycle when it is only named; roles name many.
        if found.types_only and found.owner == "roles":
            continue
        if found.area in {"errors", found.owner} or allowed == EVERYTHING or found.area in allowed:
            continue
        if found.target in VALUES and found.owner not in ("technique", "roles"):
            continue
        broken.add(str(found))
    assert not broken, "\n".join(sorted(broken))


def test_files_of_values_import_nothing_of_the_project() -> None:
    for module in VALUES:
        path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
        assert not [str(f) for f in INSIDE if f.path == path and f.area != "errors"]


def test_only_the_composition_knows_the_composition() -> None:
    composed = {"", "cli", *COMPOSITIONS}
    broken = [str(f) for f in INSIDE if f.area in composed and f.owner not in WHO_MAY_COMPOSE]
    assert not broken, "\n".join(broken)


def test_folders_do_not_know_the_acts() -> None:
    """What lies in the other folders is called by the acts and never calls them back."""
    above = {*WHO_MAY_COMPOSE, "acts"}
    broken = [str(f) for f in INSIDE if f.owner not in above and f.area in {"acts", *COMPOSITIONS}]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("folder", ["acts", "jobs"])
def test_the_acts_have_an_order(folder: str) -> None:
    """Files of these folders may use one another, but never in a circle: data flows left to right once."""
    files = {f"layerwise.{folder}.{path.stem}" for path in (PACKAGE / folder).glob("*.py")}
    uses: dict[str, set[str]] = {name: set() for name in files}
    for found in INSIDE:
        if found.owner == folder and not found.types_only and found.target in files:
            uses[f"layerwise.{folder}.{found.path.stem}"].add(found.target)
    assert any(uses.values())
    graphlib.TopologicalSorter({name: found - {name} for name, found in uses.items()}).prepare()


def test_the_machine_file_is_a_leaf() -> None:
    """Versions and memory are asked for from everywhere, so the file that knows them imports nothing heavy."""
    path = PACKAGE / "engine" / "machine.py"
    assert not [str(f) for f in ALL if f.path == path and f.target.split(".")[0] in {"layerwise", *NUMERIC}]


def test_a_technique_never_imports_another_technique() -> None:
    techniques = technique_stems()
    broken = [str(f) for f in INSIDE if f.path in techniques.values() and f.target in techniques]
    assert not broken, "\n".join(broken)


def test_nothing_imports_a_technique_by_name() -> None:
    """Techniques are found by the registry: adding one changes no list, removing one breaks no import.

    The solver in ``plan/`` is the exception: it is what the composition plans with unless told otherwise.
    """
    techniques = {name: path for name, path in technique_stems().items() if path.parent.name != "plan"}
    broken = [str(f) for f in INSIDE if f.target in techniques and f.path != techniques[f.target]]
    assert not broken, "\n".join(broken)


def test_the_verbs_only_parse_call_and_print() -> None:
    broken = [str(f) for f in ALL if f.owner == "cli" and f.target.split(".")[0] in NUMERIC]
    assert not broken, "computation belongs behind a verb, not in it:\n" + "\n".join(broken)


def test_the_verbs_use_no_other_libraries() -> None:
    import sys

    known = CLI_LIBRARIES | {"layerwise"} | set(sys.stdlib_module_names)
    broken = [str(f) for f in ALL if f.owner == "cli" and f.target.split(".")[0] not in known]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("part", ["__init__", "technique", "errors"])
def test_light_parts_import_nothing_heavy_at_the_top(part: str) -> None:
    """These are read on every start of the command line."""
    paths = [p for p in sources() if p.relative_to(PACKAGE).parts[0].removesuffix(".py") == part]
    broken = []
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = {node.lineno for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}
        broken += [str(f) for f in imports_of(path) if f.line in top and f.target.split(".")[0] in NUMERIC]
    assert not broken, "\n".join(broken)


def test_files_fit_in_one_reading() -> None:
    longest = {
        str(path.relative_to(PACKAGE)): lines
        for path in sources()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not longest, f"longer than 400 lines, so they hold two ideas: {longest}"


def test_files_are_named_after_what_they_hold() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "managers"}
    assert not [p for p in sources() if vague & set(p.relative_to(PACKAGE).with_suffix("").parts)]
