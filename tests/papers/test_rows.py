"""Evidence files are read with full checking, and their absence is no error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.papers.evidence import content, row

from layerwise.errors import InputError
from layerwise.papers.rows import FOLDER, evidence_rows
from layerwise.technique import technique_files


def written(folder: Path, value: Any) -> Path:
    (folder / "gptq.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    (found,) = evidence_rows("gptq", written(tmp_path, content()))
    assert found == row()
    assert {key: value for key, value in found.as_json().items() if key != "technique"} == content()["rows"][0]
    assert found.sentence() == (
        "stories <5m>, KL per token: 0.0035 ± 0.0002 at 2.53 MB (gptq:bits=4); rtn:bits=4: 0.007 at 2.53 MB"
    )


def test_no_folder_no_file_and_no_rows_are_no_evidence(tmp_path: Path) -> None:
    assert evidence_rows("gptq", tmp_path / "absent") == ()
    assert evidence_rows("gptq", tmp_path) == ()
    assert evidence_rows("gptq", written(tmp_path, {**content(), "rows": []})) == ()


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "'network'": lambda r: r.pop("network"),
    "'metric'": lambda r: r.update(metric=""),
    "'bytes'": lambda r: r.update(bytes=0),
    "'bytes' must be a whole": lambda r: r.update(bytes=1.5),
    "'value'": lambda r: r.update(value=float("nan")),
    "'spread'": lambda r: r.pop("spread"),
    "'seeds'": lambda r: r.update(seeds=[]),
    "'seeds' must": lambda r: r.update(seeds=[True]),
    "baseline: 'recipe'": lambda r: r["baseline"].pop("recipe"),
    "baseline: 'value'": lambda r: r["baseline"].update(value="0.1"),
    "'versions'": lambda r: r.update(versions={"torch": 2}),
    "'command'": lambda r: r.update(command=None),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_row_is_refused_by_name(message: str, tmp_path: Path) -> None:
    value = content()
    BROKEN[message](value["rows"][0])
    with pytest.raises(InputError, match=f"gptq.json, row 1.*{message}"):
        evidence_rows("gptq", written(tmp_path, value))


def test_a_file_of_another_technique_and_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must say 'gptq'"):
        evidence_rows("gptq", written(tmp_path, content("awq")))
    with pytest.raises(InputError, match="'technique' must be a text"):
        evidence_rows("gptq", written(tmp_path, []))
    (tmp_path / "gptq.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="not readable JSON"):
        evidence_rows("gptq", tmp_path)


def test_the_shipped_rows_are_readable_and_belong_to_techniques() -> None:
    for path in sorted(FOLDER.glob("*.json")):
        assert path.stem in technique_files(), f"{path.name} is the evidence of no registered technique"
        evidence_rows(path.stem)
