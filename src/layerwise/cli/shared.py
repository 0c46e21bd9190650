"""What several verbs share: option declarations, the progress display, printing as a table or as JSON."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from layerwise.probe.measurement import Measurement

Model = Annotated[str, typer.Argument(help="A Hugging Face checkpoint directory or hub id.", metavar="MODEL")]
Calibrate = Annotated[
    str, typer.Option("--calibrate", metavar="TEXT", help="Calibration text: .txt, .jsonl, .csv or a data set id.")
]
Evaluate = Annotated[
    Optional[str],  # noqa: UP045  (typer reads the annotation)
    typer.Option("--evaluate", metavar="TEXT", help="Held-out text; without it a tenth of the calibration text."),
]
Sequences = Annotated[int, typer.Option(help="Calibration sequences.")]
Length = Annotated[int, typer.Option(help="Tokens of a sequence.")]
TextColumn = Annotated[Optional[str], typer.Option(help="Column of a .csv or .jsonl file that holds the text.")]  # noqa: UP045
Pooling = Annotated[Optional[str], typer.Option(help="Pooling of a bare encoder: mean, cls, max or lasttoken.")]  # noqa: UP045
Seed = Annotated[int, typer.Option(help="The one seed.")]
Threads = Annotated[Optional[int], typer.Option(help="Threads of the passes; all cores by default.")]  # noqa: UP045
Workers = Annotated[Optional[int], typer.Option(help="Sites encoded at a time; all cores by default.")]  # noqa: UP045
Dtype = Annotated[str, typer.Option(help="Type of what is not encoded: auto, float16 or bfloat16.")]
Device = Annotated[str, typer.Option(help="Where blocks run: cpu, cuda, cuda:1, mps.")]
Techniques = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="A,B+C", help="Techniques to choose among, such as rtn,gptq,awq+gptq."),
]
Work = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="DIR", help="Work folder; kept, so that re-planning takes seconds."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
Redo = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(metavar="SITE=RECIPE", help="Encode a site of the work folder again."),
]
Keep = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(metavar="REGEX", help="Sites to leave at 16 bits; may be repeated."),
]
Fix = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(metavar="SITE=RECIPE", help="Give a site one recipe; may be repeated."),
]
Rewrite = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="NAME", help="Rewrite the whole network first, exactly: pre_rmsnorm."),
]
Allocator = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="NAME", help="Plan by a published rule instead of layerwise's own: hawq, layerwise_quant."),
]

Activations = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="NAME", help="Quantize the inputs of linears too: token_int:bits=8."),
]
Target = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="ENGINE", help="Make it loadable by transformers, vllm, llama.cpp or onnxruntime."),
]

UNFOLDED = 240  # columns


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """``16,32`` -> numbers."""
    from layerwise.errors import InputError

    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise InputError(f"--{option} must be whole numbers, such as 16,32, not {text!r}")
    return tuple(map(int, words))


def split_techniques(text: str | None) -> tuple[str, ...]:
    """``rtn,gptq:bits=3,group=64`` -> techniques; a comma after an option continues the options."""
    parts: list[str] = []
    for piece in (text or "").split(","):
        if not piece.strip():
            continue
        if "=" in piece and ":" not in piece and parts:
            parts[-1] += "," + piece.strip()
        else:
            parts.append(piece.strip())
    return tuple(parts)


def given_command() -> str:
    """The command as it was typed."""
    return "layerwise " + shlex.join(sys.argv[1:])


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> None:
    """A rich table on standard output."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, box=SIMPLE_HEAD, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i in numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width to fold names at
        console = Console(width=UNFOLDED)
    console.print(table)


def show_measurement(found: Measurement, page: Path | None, json: bool) -> None:
    """A measurement as JSON, or its table without columns of detail, what it says and what it cannot say.

    page: where its pictures are written, if they are asked for.
    """
    from layerwise.report.figures import probe_value

    if page is not None:
        from layerwise.report.probe_page import write_page

        write_page(page, found, given_command())
    if json:
        print_json(found.as_json())
        return

    shown = [i for i, column in enumerate(found.columns) if not column.detail]
    print_table(
        f"{found.title}: {found.network}",
        ("", *(found.columns[i].name for i in shown)),
        [(row.place, *(probe_value(row.values[i], found.columns[i].digits) for i in shown)) for row in found.rows],
        numeric=range(1, len(shown) + 1),
    )
    print(found.summary)
    print(found.caution)
    if page is not None:
        print(f"wrote {page}")


class Bar:
    """Progress on standard error: stage, how far, time left; a plain line a stage where it is not a terminal."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def note(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        if self.quiet:
            yield lambda: None
            return
        console = Console(stderr=True)
        if not console.is_terminal:
            began = time.perf_counter()
            yield lambda: None
            console.print(f"{name}: {time.perf_counter() - began:.1f} s", highlight=False)
            return
        columns = (
            TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=console) as shown:
            task = shown.add_task(name, total=total)
            yield lambda: shown.advance(task)
