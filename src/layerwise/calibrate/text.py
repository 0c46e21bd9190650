"""Reading calibration and evaluation text.

A source is a ``.txt`` file (one text a line), a ``.jsonl`` file (one record a line), a ``.csv`` file, the id of a data
set (with the ``datasets`` extra), or ``default``: the passages that ship with the package. What comes out is lines,
grouped into documents; documents, never lines, are what the splits divide.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from layerwise.errors import InputError, nearest

LINES_PER_DOCUMENT = 64  # a file of lines is cut into documents of this many
FEWEST_DOCUMENTS = 24  # a shorter file is cut finer, so that every split gets some
TELLING_LENGTH = 25  # characters; a shorter line may well occur twice by chance
LONG_LINE = 60  # characters; one shared line of this length is no coincidence
TOLERATED_OVERLAP = 0.01  # share of evaluation's lines that may be shared stock phrases
DEFAULT = "default"


@dataclass(frozen=True)
class Text:
    """Documents of lines, without repeated lines. ``scores`` are present for a scored CSV of sentence pairs."""

    source: str
    documents: tuple[tuple[str, ...], ...]
    pairs: tuple[tuple[str, str, float], ...] = ()

    @property
    def lines(self) -> Iterator[str]:
        for document in self.documents:
            yield from document


def read_text(source: str, column: str | None = None) -> Text:
    """Read a source. Raises ``InputError`` when it is missing, empty, not UTF-8, or lacks the column."""
    if source == DEFAULT:
        packaged = resources.files("layerwise.calibrate").joinpath("default.txt").read_text(encoding="utf-8")
        return Text("the package's default text", cut(without_repeats(packaged.splitlines())))
    path = Path(source)
    if path.is_dir():
        raise InputError(f"{source} is a directory; text must be a .txt, .jsonl or .csv file or a data set id")
    if not path.exists():
        if path.suffix in (".txt", ".jsonl", ".csv") or source.startswith((".", "/")):
            raise InputError(f"there is no text file {source}")
        return _read_data_set(source, column)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as reason:
        raise InputError(f"{source} is not UTF-8 text (byte {reason.start}); convert it to UTF-8") from None
    if not content.strip():
        raise InputError(f"{source} is empty; it must hold lines of text")
    if path.suffix == ".jsonl":
        documents = tuple(without_repeats(t.splitlines()) for t in _json_texts(content, source, column))
        return Text(source, tuple(d for d in documents if d))
    if path.suffix == ".csv":
        lines, pairs = _csv_texts(content, source, column)
        return Text(source, cut(without_repeats(lines)), pairs)
    return Text(source, cut(without_repeats(content.splitlines())))


def without_repeats(lines: Iterable[str]) -> tuple[str, ...]:
    """Stripped, non-empty lines; a line long enough to tell is kept once."""
    seen: set[str] = set()
    kept = []
    for line in (raw.strip() for raw in lines):
        if line and (len(line) < TELLING_LENGTH or line not in seen):
            kept.append(line)
            seen.add(line)
    return tuple(kept)


def cut(lines: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Runs of ``LINES_PER_DOCUMENT`` lines, shorter where that would leave too few documents to split."""
    run = max(1, min(LINES_PER_DOCUMENT, len(lines) // FEWEST_DOCUMENTS))
    return tuple(lines[i : i + run] for i in range(0, len(lines), run))


def refuse_overlap(calibration: Text, evaluation: Text) -> None:
    """Evaluation must be on lines that calibration has not seen; a few short stock phrases may recur."""
    seen = {line for line in calibration.lines if len(line) >= TELLING_LENGTH}
    shared = [line for line in evaluation.lines if line in seen]
    count = sum(1 for _ in evaluation.lines)
    if len(shared) > TOLERATED_OVERLAP * count or any(len(line) >= LONG_LINE for line in shared):
        example = max(shared, key=len)
        raise InputError(
            f"{len(shared)} evaluation lines of {evaluation.source} are in the calibration text too, such as "
            f"{example[:60]!r}; evaluation needs text that calibration has not seen"
        )


def _json_texts(content: str, source: str, column: str | None) -> Iterator[str]:
    for number, raw in enumerate(content.splitlines(), 1):
        if not raw.strip():
            continue
        try:
            record = json.loads(raw)
        except ValueError:
            raise InputError(f"{source} line {number} is not JSON; a .jsonl file holds one record a line") from None
        if isinstance(record, str) and column is None:
            yield record
            continue
        if not isinstance(record, dict):
            raise InputError(f"{source} line {number} is not a JSON object with a text column")
        first = next((k for k, v in record.items() if isinstance(v, str)), "")
        name = column or ("text" if "text" in record else first)
        if not isinstance(record.get(name), str):
            raise InputError(f"{source} line {number} has no text column {name!r}{nearest(name, list(record))}")
        yield record[name]


def _csv_texts(content: str, source: str, column: str | None) -> tuple[list[str], tuple[tuple[str, str, float], ...]]:
    """Cells that are text, and scored pairs where the columns are two texts and a number."""
    try:
        rows = [row for row in csv.reader(content.splitlines()) if row]
    except csv.Error as reason:
        raise InputError(f"{source} is not a readable CSV file ({reason})") from None
    header = column is not None and not column.isdigit()
    if column is not None:
        names = rows[0] if header else [str(i) for i in range(len(rows[0]))]
        if column not in names:
            raise InputError(f"{source} has no column {column!r}{nearest(column, names)}")
        place = names.index(column)
        return [row[place] for row in rows[int(header) :] if len(row) > place], ()
    textual = [i for i in range(len(rows[0])) if not all(_is_number(row[i]) for row in rows[1:50] if len(row) > i)]
    if not textual:
        raise InputError(f"{source} has no column of text; name one with --text-column")
    pairs: tuple[tuple[str, str, float], ...] = ()
    if len(rows[0]) == 3 and textual == [0, 1]:
        pairs = tuple((r[0], r[1], float(r[2])) for r in rows if len(r) == 3 and _is_number(r[2]))
        lines = [cell for first, second, _ in pairs for cell in (first, second)]
    else:
        lines = [row[i] for row in rows for i in textual if len(row) > i]
    return lines, pairs


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _read_data_set(source: str, column: str | None) -> Text:
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"there is no text file {source}; to read it as a data set id install layerwise[datasets]"
        ) from None
    try:
        records = datasets.load_dataset(source, split="train", streaming=True)
        texts = [str(record[column or "text"]) for record, _ in zip(records, range(20_000), strict=False)]
    except Exception as reason:  # the library raises many kinds; all of them mean that the id cannot be read
        raise InputError(f"data set {source} cannot be read ({str(reason).splitlines()[0][:160]})") from None
    return Text(source, tuple(filter(None, (without_repeats(t.splitlines()) for t in texts))))
