"""The journal: what was recorded is there after a kill at any byte, and a folder belongs to one run at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerwise.engine.journal import Journal, identity_of
from layerwise.errors import InputError

UNITS = {"forward/0": None, "forward/1": None, "candidates/tail": {"head": [1, 2.5, "é"]}, "candidates/block.0": {}}


def filled(folder: Path, identity: str = "one") -> Journal:
    journal = Journal(folder, identity)
    for unit, value in UNITS.items():
        journal.record(unit, value)
    return journal


def test_a_second_run_finds_what_the_first_recorded(tmp_path: Path) -> None:
    filled(tmp_path / "work").close()
    again = Journal(tmp_path / "work", "one")
    assert again.entries == UNITS
    assert again.has("candidates/tail") and not again.has("candidates/tables")
    assert again["candidates/tail"] == UNITS["candidates/tail"]
    again.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.data())
def test_a_kill_at_any_byte_leaves_whole_units_only(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "work"
    filled(folder).close()
    file = folder / "journal.jsonl"
    whole = file.read_bytes()
    kept = data.draw(st.integers(0, len(whole)))
    file.write_bytes(
        whole[:kept] + data.draw(st.sampled_from([b"", b"\x00\x00", b'{"unit": "x"']))[: len(whole) - kept]
    )
    journal = Journal(folder, "one")
    count = whole[:kept].count(b"\n")
    assert journal.entries == dict(list(UNITS.items())[:count])
    journal.record("next", 1)
    journal.close()
    last = Journal(folder, "one")
    assert last.entries == {**dict(list(UNITS.items())[:count]), "next": 1}
    last.close(remove=True)


def test_a_forgotten_unit_is_gone_for_good(tmp_path: Path) -> None:
    journal = filled(tmp_path / "work")
    journal.forget("forward/1")
    journal.forget("never recorded")
    journal.record("after", 1)
    journal.close()
    again = Journal(tmp_path / "work", "one")
    assert again.entries == {**{u: v for u, v in UNITS.items() if u != "forward/1"}, "after": 1}
    again.close()


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "work", "one")
    code = (
        "import sys\nfrom pathlib import Path\nfrom layerwise.engine.journal import Journal\n"
        "from layerwise.errors import InputError\n"
        f"try:\n    Journal(Path({str(tmp_path / 'work')!r}), 'one')\nexcept InputError as said:\n    print(said)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "another run is using" in done.stdout
    journal.close()


def test_the_folder_of_another_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    filled(tmp_path / "work").close()
    before = (tmp_path / "work" / "journal.jsonl").read_bytes()
    with pytest.raises(InputError, match="belongs to another run"):
        Journal(tmp_path / "work", "two")
    assert (tmp_path / "work" / "journal.jsonl").read_bytes() == before
    filled(tmp_path / "work").close()


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not touch")
    with pytest.raises(InputError, match="not layerwise's"):
        Journal(tmp_path, "one")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_closing_can_remove_the_folder(tmp_path: Path) -> None:
    filled(tmp_path / "work").close(remove=True)
    assert not (tmp_path / "work").exists()


def test_the_identity_depends_on_values_and_not_on_their_order() -> None:
    assert identity_of({"a": 1, "b": [2]}) == identity_of({"b": [2], "a": 1}) != identity_of({"a": 1, "b": [3]})
