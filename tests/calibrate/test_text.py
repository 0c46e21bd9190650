"""Reading text: the kinds of file, what is dropped, how lines become documents, and what is refused."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from layerwise.calibrate.text import (
    FEWEST_DOCUMENTS,
    LINES_PER_DOCUMENT,
    Text,
    cut,
    read_text,
    refuse_overlap,
    without_repeats,
)
from layerwise.errors import InputError

LONG = "a line that is certainly longer than sixty characters, so that it cannot be a coincidence"


def written(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_lines_of_a_text_file_are_stripped_and_long_ones_kept_once(tmp_path: Path) -> None:
    source = written(tmp_path / "a.txt", f"  yes \n\n{LONG}\nyes\n{LONG}\n")
    assert list(read_text(source).lines) == ["yes", LONG, "yes"]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    assert list(read_text(written(tmp_path / "a.txt", b"\xef\xbb\xbfword\n")).lines) == ["word"]


@pytest.mark.parametrize("count", [1, 23, 24, 100, 64 * 24, 5000])
def test_documents_are_runs_of_lines_that_lose_nothing(count: int) -> None:
    lines = tuple(f"line {i}" for i in range(count))
    documents = cut(lines)
    assert tuple(line for document in documents for line in document) == lines
    assert max(map(len, documents)) <= LINES_PER_DOCUMENT
    assert len(documents) >= min(count, FEWEST_DOCUMENTS)


def test_each_json_record_is_a_document(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", '{"id": 1, "text": "one\\ntwo"}\n\n{"id": 2, "text": "three"}\n')
    assert read_text(source).documents == (("one", "two"), ("three",))


def test_a_json_column_can_be_named(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", '{"text": "no", "body": "yes"}\n')
    assert list(read_text(source, "body").lines) == ["yes"]
    with pytest.raises(InputError, match=r"line 1 has no text column 'bod'.*body"):
        read_text(source, "bod")


def test_scored_pairs_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("first", "second", "score"), ("a, b", "c", "2.5"), ("d", "e", "0")])
    text = read_text(str(path))
    assert text.pairs == (("a, b", "c", 2.5), ("d", "e", 0.0))
    assert list(text.lines) == ["a, b", "c", "d", "e"]


def test_a_csv_column_can_be_named(tmp_path: Path) -> None:
    source = written(tmp_path / "a.csv", "id,body,note\n1,one,x\n2,two,y\n")
    assert list(read_text(source, "body").lines) == ["one", "two"]
    assert read_text(source, "body").pairs == ()
    with pytest.raises(InputError, match=r"no column 'bady'.*body"):
        read_text(source, "bady")


def test_the_packaged_text_is_large_and_varied() -> None:
    text = read_text("default")
    assert len(text.documents) > 60
    assert sum(map(len, text.lines)) > 200_000


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n \n", "is empty"),
        ("a.txt", b"caf\xe9\n", "not UTF-8"),
        ("a.jsonl", b"{oops\n", "line 1 is not JSON"),
        ("a.jsonl", b"[1]\n", "not a JSON object"),
        ("a.csv", b"1,2\n3,4\n", "no column of text"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        read_text(written(tmp_path / name, content))
    assert name in str(refused.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no text file"):
        read_text(str(tmp_path / "absent.txt"))
    with pytest.raises(InputError, match="is a directory"):
        read_text(str(tmp_path))


def test_a_shared_long_line_is_refused_and_stock_phrases_are_not() -> None:
    seen = Text("calibration", ((LONG, "Thank you very much for that."),))
    other = tuple(f"something else entirely, number {i}" for i in range(150))
    refuse_overlap(seen, Text("evaluation", ((*other, "Thank you very much for that."),)))
    with pytest.raises(InputError, match="1 evaluation lines of evaluation"):
        refuse_overlap(seen, Text("evaluation", ((*other, LONG),)))


def test_short_lines_may_repeat() -> None:
    assert without_repeats(["yes", "yes", LONG, LONG]) == ("yes", "yes", LONG)


def test_the_examples_keep_their_texts_apart() -> None:
    folder = Path(__file__).resolve().parents[2] / "examples"
    held_out = read_text(str(folder / "docs_heldout.txt"))
    for source in ("default", str(folder / "docs_calibrate.txt")):
        refuse_overlap(read_text(source), held_out)
