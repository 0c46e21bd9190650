"""The example scripts: the repository's calibration texts are taken from the whole training text."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_docs_lm", ROOT / "examples" / "train_docs_lm.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_sample_is_spread_over_the_whole_text(script: ModuleType) -> None:
    lines = [f"line {i:06d}" for i in range(64 * 200)]
    sample = script.sample_evenly("\n".join(lines), 12 * 64 * 20)
    runs = [sample.splitlines()[i : i + 64] for i in range(0, len(sample.splitlines()), 64)]
    starts = [int(run[0].split()[1]) // 64 for run in runs]
    assert len(runs) == 20
    assert starts == sorted(set(starts)) and starts[0] < 10 and starts[-1] >= 190
    assert all(run == lines[64 * s : 64 * s + 64] for run, s in zip(runs, starts, strict=True))


def test_a_short_text_is_taken_whole(script: ModuleType) -> None:
    assert script.sample_evenly("one\ntwo", 10**6) == "one\ntwo\n"


def test_the_committed_texts_are_of_the_promised_size(script: ModuleType) -> None:
    for path, characters in script.CALIBRATION_TEXTS.items():
        assert len(path.read_text(encoding="utf-8")) == pytest.approx(characters, rel=0.02), path.name
