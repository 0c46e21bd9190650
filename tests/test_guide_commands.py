"""Every command that the guide shows is run, page by page, on tiny networks under the names that the guide uses.

A page's commands run in one folder and in order, so that a later one finds what an earlier one wrote. Runs are kept
small by options that say how much text is read; nothing else of a command is changed but what stands in ``WRITTEN``.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.command import layerwise
from tests.conftest import made_up_sentences

from layerwise import technique
from layerwise.jobs import bench

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = {"--sequences": "48", "--length": "32", "--threads": "1", "--workers": "1"}
# A tiny network cannot be as small as the guide's example, in bits a weight, nor as large in bytes.
WRITTEN = {
    "12MB": "100kB",
    "2.6bpw": "5bpw",
    "3bpw": "5bpw",
    "4bpw": "6bpw",
    "4.5bpw": "6bpw",
    "1%": "100%",
    "kl:0.01": "kl:1",
    "SITE=rtn:bits=6,group=64": "model.layers.0.mlp.up_proj=rtn:bits=6,group=64",
    "P": "OUT",
    "A": "OUT",
    "B": "OUT",
    "300": "3",  # steps of training
    "hidden:steps=300": "hidden:steps=3",
    "logits:steps=300": "logits:steps=3",
    "layer_skip:steps=400": "layer_skip:steps=3",
    "cola:samples=40": "cola:samples=2",
    "eagle": "eagle:steps=2,batch=2,length=16",
    "act": "act:windows=2,length=8",
    "act:heads=2.0/2.3": "act:heads=0.0/1.1",
}
OPTIONAL = re.compile(r"distance:")  # the loss of an encoder, shown beside those of a causal network


def shown(page: Path) -> list[str]:
    """Commands of a page's shell blocks: lines joined at backslashes, comments dropped."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = re.sub(r"\\\n\s*", " ", "\n".join(blocks)).splitlines()
    return [line for line in (re.sub(r"\s#.*", "", line).strip() for line in lines) if line and line[0] != "#"]


def verb_options() -> dict[str, set[str]]:
    import typer.main

    from layerwise.cli.main import app

    commands: Mapping[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = {name: {o for p in command.params for o in p.opts} for name, command in commands.items()}
    plan: Any = commands["plan"]
    return found | {"plan": {o for p in plan.commands["make"].params for o in p.opts}}


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that holds, under the guide's names, networks and texts; the example technique is registered."""
    lines = made_up_sentences()
    for name in ("text.txt", "sentences.txt", "examples/docs_calibrate.txt"):
        write(tmp_path / name, lines[:320])
    for name in ("held-out.txt", "other-sentences.txt", "examples/docs_heldout.txt"):
        write(tmp_path / name, lines[320:])
    for name, network in (("MODEL", tiny_llama), ("models/minilm", tiny_bert), ("examples/docs-lm", tiny_llama)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copytree(network, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bench, "EXAMPLES", tmp_path / "examples")
    register_example(monkeypatch)
    yield tmp_path


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def register_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """The technique of CONTRIBUTING.md, as the registry would find it in its folder."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    source = next(b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Trimmed" in b)
    module = types.ModuleType("layerwise.quantize.trimmed")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, "CONTRIBUTING.md", "exec"), module.__dict__)
    files = {**technique.technique_files(), "trimmed": module.__name__}
    monkeypatch.setattr(technique, "technique_files", lambda: files)


@pytest.mark.parametrize("page", [page for page in PAGES if shown(page)], ids=lambda page: page.name)
def test_commands_run(page: Path, folder: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for command in shown(page):
        words = shlex.split(command)
        if words[0] == "make":
            assert words[1] in targets, command
        elif words[0] == "layerwise":
            run(words, folder)
        else:
            assert words[0] in ("pip", ".ci/run"), f"{page.name} shows {command!r}, which no test runs"


def run(words: list[str], folder: Path) -> None:
    given = [WRITTEN.get(word, word) for word in words[1:]]
    if any(OPTIONAL.match(word) for word in given):
        given = ["models/minilm" if word == "MODEL" else word for word in given]
        given = ["distance:1" if OPTIONAL.match(word) else word for word in given]
    verb, known = given[0], verb_options()[given[0]]
    if not (verb == "plan" and given[1] in ("show", "diff")):
        for option, value in SMALL.items():
            if option in known and option not in given:
                given += [option, value]
    out = out_of(given)
    if "--plan" in given:  # an edited copy of the last plan
        shutil.copy(folder / "OUT" / "plan.json", folder / given[given.index("--plan") + 1])
    if out is not None and (folder / out).exists():
        shutil.rmtree(folder / out)
    if verb in ("evaluate", "export", "report", "generate") or given[1:2] in (["show"], ["diff"]):
        needed(given, folder)
    if verb == "compress" and "--no-baseline" not in given:
        given.append("--no-baseline")  # what it costs is tested elsewhere
    done = layerwise(*given)
    assert done.code == 0, f"layerwise {' '.join(given)}\n{done.err}"


def out_of(given: list[str]) -> str | None:
    """The folder that a command writes: the second word that is no option."""
    if given[0] not in ("compress", "export"):
        return None
    return given[2]


def needed(given: list[str], folder: Path) -> None:
    """The artifact that a page talks about without having shown how it was made."""
    for word in given[1:]:
        network = {"OUT": "MODEL", "minilm-small": "models/minilm", "minilm-4.5bpw": "models/minilm"}.get(word)
        if network is not None and not (folder / word).exists():
            small = [part for pair in SMALL.items() for part in pair]
            done = layerwise("compress", network, word, "--uniform", "rtn:bits=4", *small, "--no-baseline")
            assert done.code == 0, done.err
