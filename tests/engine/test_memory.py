"""Settings of the C library's allocator: they hold within, and freed memory is gone afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import torch
from layerwise.engine.memory import give_back, large_apart, one_pool, reused
from layerwise.engine.workers import each

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def work(n):
    return float((torch.ones(n, 1 << 18) + 1).sum())  # pieces of 1 to 8 MB

one_pool()
torch.ones(1 << 22).sum()
with large_apart():
    before = resident()
    with reused():
        assert list(each(work, [1, 8, 2, 4] * 6, 2)) == [n * 2.0 * (1 << 18) for n in [1, 8, 2, 4] * 6]
    print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_threads_freed_is_given_back() -> None:
    source = str(Path(__file__).resolve().parents[2] / "src")
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r})\n{CODE}"],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert not done.returncode, done.stderr
    assert int(done.stdout) < 24 << 20
