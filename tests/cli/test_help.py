"""Help: every verb explains itself, every option says what it does, and the README's table of options is complete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from layerwise.cli.main import app
from layerwise.cli.shared import split_techniques

ROOT = Path(__file__).resolve().parents[2]
VERBS = (
    "compress",
    "inspect",
    "calibrate",
    "plan",
    "evaluate",
    "export",
    "import",
    "report",
    "compare",
    "bench",
    "papers",
    "probe",
    "train",
    "tune",
    "fit",
    "doctor",
    "reshape",
    "depth",
    "generate",
    "search",
)


def commands() -> dict[str, Any]:
    """Every command by the words that call it."""
    found: dict[str, Any] = {}

    def walk(group: Any, words: tuple[str, ...]) -> None:
        for name, command in group.commands.items():
            found[" ".join((*words, name))] = command
            if hasattr(command, "commands"):
                walk(command, (*words, name))

    walk(typer.main.get_command(app), ())
    return found


COMMANDS = commands()
OPTIONS = [
    (words, option)
    for words, command in COMMANDS.items()
    for option in command.params
    if option.param_type_name == "option" and "--help" not in option.opts
]


def help_of(*words: str) -> str:
    done = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "140"})
    assert done.exit_code == 0, done.output
    return done.output


def test_the_first_page_lists_every_verb() -> None:
    page = help_of()
    assert set(VERBS) == {name for name in COMMANDS if " " not in name}
    assert all(re.search(rf"\b{verb}\b", page) for verb in VERBS)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda w: w.replace(" ", "-"))
def test_every_command_explains_itself(words: str) -> None:
    page = help_of(*words.split())
    assert COMMANDS[words].help or COMMANDS[words].callback.__doc__
    for parameter in COMMANDS[words].params:
        if parameter.param_type_name == "option":
            assert parameter.opts[0] in page


@pytest.mark.parametrize(("words", "option"), OPTIONS, ids=lambda v: v if isinstance(v, str) else v.opts[0])
def test_every_option_says_what_it_does(words: str, option: Any) -> None:
    assert option.help and option.help.endswith((".", ")"))


def test_every_table_can_be_had_as_json() -> None:
    prints_tables = {
        "compress", "inspect", "calibrate", "evaluate", "report", "plan make", "plan show", "plan diff", "compare",
        "bench", "papers", "probe", "reshape", "train", "tune", "doctor", "generate", "depth", "search", "fit",
    }  # fmt: skip
    with_json = {words for words, option in OPTIONS if "--json" in option.opts}
    assert prints_tables == with_json


def test_the_readme_names_every_option_of_compress_and_no_other() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The main command")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `--")]
    named = {option for row in rows for option in re.findall(r"--[a-z-]+", row)}
    assert named == {option.opts[0] for words, option in OPTIONS if words == "compress"}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ()),
        ("", ()),
        ("rtn", ("rtn",)),
        ("rtn, gptq", ("rtn", "gptq")),
        ("rtn,gptq:bits=3,group=64,hqq", ("rtn", "gptq:bits=3,group=64", "hqq")),
        ("awq+gptq:bits=4,group=32", ("awq+gptq:bits=4,group=32",)),
    ],
)
def test_a_comma_after_an_option_continues_the_options(text: str | None, parts: tuple[str, ...]) -> None:
    assert split_techniques(text) == parts
