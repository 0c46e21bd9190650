"""One finished run for the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.command import compress


@pytest.fixture(scope="session")
def finished_plan(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, sentences: Path) -> Path:
    """``plan.json`` of the causal network compressed at 5 bpw. Do not write into its folder."""
    out = tmp_path_factory.mktemp("finished") / "OUT"
    done = compress(tiny_llama, out, sentences, "--budget", "5bpw", "--no-baseline")
    assert done.code == 0, done.err
    return out / "plan.json"
