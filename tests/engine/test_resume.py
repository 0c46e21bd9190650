"""A run that is killed continues: same command, same bytes, and never half a result.

One process imports everything once and forks a child for each attempt, so that kills fall into the work rather than
into imports. The moments are random (and seeded); ``benchmarks`` holds the longer version.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.command import SMALL, compress

from layerwise.engine.journal import Journal

COMPARED = ("model.safetensors", "config.json", "plan.json")
KILLS = 6

ATTEMPTS = """
import os, random, signal, sys, time
from pathlib import Path
import layerwise.compress, layerwise.encoding.loops, scipy.optimize
from layerwise.cli.main import main

folder, kills, command = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
draw = random.Random(5)

def attempt(out, delay):
    # The exit code of the child, or None when it was killed after ``delay`` seconds.
    child = os.fork()
    if child == 0:
        sys.argv = ["layerwise", *(str(out) if a == "OUT" else a for a in command)]
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        try:
            main()
        except SystemExit as end:
            os._exit(end.code or 0)
        os._exit(9)
    end = time.monotonic() + delay
    while time.monotonic() < end:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None

sys.argv = ["layerwise", *command, "--dry-run"]  # imports all there is, and starts no thread that a fork would lose
try:
    main()
except SystemExit as end:
    assert not end.code
began = time.monotonic()
assert attempt(folder / "undisturbed", 300) == 0
usual, killed, round_, units = time.monotonic() - began, 0, 0, set()
while killed < kills:
    out, code = folder / f"killed-{round_}", None
    while code is None:
        code = attempt(out, draw.uniform(0.05, 0.7) * usual)
        if code is None:
            killed += 1
            assert not out.exists() or len(list(out.iterdir())) >= 8, "half a result became visible"
            journal = folder / f"killed-{round_}.work" / "journal.jsonl"
            units.add(journal.read_bytes().count(b"\\n") if journal.exists() else -1)
            if out.exists():
                code = 0  # killed after the rename
        elif code != 0:
            sys.exit(f"the resumed command failed with {code}")
    round_ += 1
print(killed, round_, sorted(units))
"""


def digests(out: Path) -> dict[str, str]:
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in COMPARED}


def test_killed_at_random_moments(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    command = ["compress", str(tiny_llama), "OUT", "--calibrate", str(sentences), *SMALL, "--budget", "5bpw"]
    done = subprocess.run(
        [sys.executable, "-c", ATTEMPTS, str(tmp_path), str(KILLS), *command],
        capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    killed, rounds, units = done.stdout.strip().splitlines()[-1].split(" ", 2)
    assert int(killed) >= KILLS
    assert len(json.loads(units)) > 2, "kills fell into several stages"
    expected = digests(tmp_path / "undisturbed")
    for number in range(int(rounds)):
        assert digests(tmp_path / f"killed-{number}") == expected
    leftovers = [p.name for p in tmp_path.iterdir() if p.name.endswith(".partial")]
    assert not leftovers


def test_the_number_of_workers_does_not_show(tiny_gpt2: Path, sentences: Path, tmp_path: Path) -> None:
    found = []
    for workers in ("1", "2", "3"):
        small = (*SMALL[:-1], workers)
        out = tmp_path / workers
        done = compress(tiny_gpt2, out, sentences, "--budget", "6bpw", "--no-baseline", small=small)
        assert done.code == 0, done.err
        found.append(digests(out))
    assert found[0] == found[1] == found[2]


def test_an_interrupt_says_how_to_resume(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    command = ["compress", str(tiny_llama), "OUT", "--calibrate", str(sentences), *SMALL, "--budget", "5bpw"]
    process = subprocess.Popen(
        [sys.executable, "-m", "layerwise.cli.main", *command],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # a shell starts background jobs with interrupts ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    journal = tmp_path / "OUT.work" / "journal.jsonl"
    end = time.monotonic() + 120
    while not (journal.exists() and journal.stat().st_size) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    if process.poll() is not None:
        pytest.fail(f"the run ended before it could be interrupted: {process.communicate()[1]}")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err.rstrip().splitlines()[-1].startswith("layerwise: interrupted; ")
    assert "same command continues: layerwise compress" in err and "Traceback" not in err
    assert not (tmp_path / "OUT").exists() and journal.exists()


def test_killed_while_the_folder_was_taken(tmp_path: Path) -> None:
    """The identity is written beside its name first; half of it is no reason to refuse the folder."""
    work, identity = tmp_path / "work", "1" * 64
    work.mkdir()
    (work / "lock").touch()
    (work / "identity.part").write_text(identity[:10])
    journal = Journal(work, identity)
    journal.record("unit", 1)
    journal.close()
    assert (work / "identity").read_text().strip() == identity
