"""Killed and resumed, alone or with many workers: the same bytes.

    python benchmarks/resume.py [NETWORK] [--kills 20] [--workers 1 2 3] [--seed 0] [--json FILE]

An undisturbed run gives the SHA-256 of ``model.safetensors``, ``config.json`` and ``plan.json``. Then the same command
is killed with SIGKILL at random moments of its work (from taking its folder to the end) and started again until it
ends; a run that ends before its moment is compared, and the next begins afresh. Exits with 1 when any file differs or
a killed run left a result that is not whole.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.runs import default_network, default_texts
from benchmarks.tables import Table, add_output_options, publish

FILES = ("model.safetensors", "config.json", "plan.json")


@dataclass(frozen=True)
class Command:
    """``layerwise compress`` with everything but OUT and the number of workers."""

    given: argparse.Namespace

    def words(self, out: Path, workers: int) -> list[str]:
        given = self.given
        usual = default_texts(given.network)
        calibrate, evaluate = given.calibrate or usual[0], given.evaluate or usual[1]
        words = [
            sys.executable, "-m", "layerwise.cli.main", "compress", given.network, str(out),
            "--budget", given.budget, "--calibrate", calibrate, "--evaluate", evaluate,
            "--sequences", str(given.sequences), "--length", str(given.length), "--threads", str(given.threads),
            "--workers", str(workers), "--no-baseline",
        ]  # fmt: skip
        return [*words, "--techniques", given.techniques] if given.techniques else words

    def started(self, out: Path, workers: int) -> subprocess.Popen[str]:
        """A run that has taken its work folder."""
        before = opened_at(out)
        words = self.words(out, workers)
        child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for_work(child, out, before)
        return child

    def run(self, out: Path, workers: int) -> float:
        """Run to the end; seconds from the moment it took its work folder."""
        child = self.started(out, workers)
        began = time.perf_counter()
        finish(child)
        return time.perf_counter() - began

    def run_until(self, out: Path, workers: int, seconds: float | None) -> bool:
        """Run, and kill ``seconds`` after it took its work folder; whether it ended by itself."""
        child = self.started(out, workers)
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            return False
        finish(child)
        return True


def work_of(out: Path) -> Path:
    """The work folder that ``layerwise compress`` makes beside its result."""
    return out.with_name(out.name + ".work")


def opened_at(out: Path) -> int:
    """When a run last took the work folder (a run empties the lock file as it begins); 0 before the first."""
    lock = work_of(out) / "lock"
    return lock.stat().st_mtime_ns if lock.is_file() else 0


def wait_for_work(child: subprocess.Popen[str], out: Path, before: int) -> None:
    """Until the run takes its work folder: a start-up leaves nothing that a kill could spoil."""
    while child.poll() is None and opened_at(out) == before:
        time.sleep(0.02)


def finish(child: subprocess.Popen[str]) -> None:
    _, said = child.communicate()
    if child.returncode != 0:
        raise SystemExit(f"layerwise compress ended with code {child.returncode}: {said.strip()[-400:]}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("network", nargs="?", default=default_network(), help="checkpoint directory (%(default)s)")
    parser.add_argument("--calibrate", metavar="TEXT", help="calibration text; by default one that suits the network")
    parser.add_argument("--evaluate", metavar="TEXT", help="held-out text")
    parser.add_argument("--budget", default="4bpw")
    parser.add_argument("--techniques", metavar="A,B", help="techniques to choose among; the package's default")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kills", type=int, default=20, help="moments at which a run is killed (%(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3], help="workers of whole runs (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    add_output_options(parser)
    given = parser.parse_args(arguments)
    command = Command(given)
    with tempfile.TemporaryDirectory(prefix="layerwise-resume-") as folder:
        place = Path(folder)
        command.run(place / "first", given.workers[0])  # compiled code and cached files: what follows is timed warm
        expected = digests(place / "first")
        shutil.rmtree(place / "first")
        rows = [whole(command, place, workers, expected) for workers in given.workers]
        seconds = rows[0]["seconds"]
        kills = disturbed(command, place, given, expected, seconds)
    results = sum(row["ended"] for row in kills)
    tables = [
        Table.of("whole runs with different numbers of workers", rows),
        Table.of(f"{given.kills} kills over {results} results", kills),
    ]
    good = all(row["same bytes"] for row in rows) and all(row["same bytes"] is not False for row in kills)
    publish(
        given, tables, {"benchmark": "resume", "sha256": expected, "rows": rows, "kills": kills, "same bytes": good}
    )
    for name, digest in expected.items():
        print(f"{digest}  {name}")
    print("every result has these bytes" if good else "NOT every result has these bytes")
    return int(not good)


def whole(command: Command, place: Path, workers: int, expected: dict[str, str]) -> dict[str, Any]:
    """A run that nobody disturbs."""
    out = place / f"workers{workers}"
    seconds = command.run(out, workers)
    same = digests(out) == expected
    shutil.rmtree(out)
    return {"workers": workers, "seconds": round(seconds, 2), "same bytes": same}


def disturbed(
    command: Command, place: Path, given: argparse.Namespace, expected: dict[str, str], seconds: float
) -> list[dict[str, Any]]:
    """One row a start: when it was killed, what the work folder knew then, and whether the result was the same."""
    draw = random.Random(given.seed)
    rows: list[dict[str, Any]] = []
    out, killed, started = place / "killed", 0, 0
    work = work_of(out)
    while killed < given.kills or not rows[-1]["ended"]:
        started += 1
        last = killed >= given.kills
        moment = None if last else draw.uniform(0, seconds)
        ended = command.run_until(out, given.workers[started % len(given.workers)], moment)
        killed += not ended
        there = out.exists()  # after a kill: the rename may have been done already
        same = digests(out) == expected if there else None
        journal = work / "journal.jsonl"
        rows.append(
            {
                "start": started,
                "workers": given.workers[started % len(given.workers)],
                "killed after s": None if ended or moment is None else round(moment, 2),
                "units in journal": journal.read_bytes().count(b"\n") if journal.is_file() else 0,
                "ended": ended,
                "same bytes": same,
            }
        )
        if there:
            shutil.rmtree(out)
            shutil.rmtree(work, ignore_errors=True)
    return rows


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of the files that must not differ; empty for one that is missing."""
    return {
        name: hashlib.sha256((out / name).read_bytes()).hexdigest() if (out / name).is_file() else "" for name in FILES
    }


if __name__ == "__main__":
    sys.exit(main())
