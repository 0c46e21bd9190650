"""Running one quantizer in a process of its own: its weights, its bytes, its time and its memory.

What a process gave is kept under a name made of all that decides it, so that a comparison that was interrupted goes on
where it was; its times are those of the run that made it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import WORKERS, reason


@dataclass(frozen=True)
class Outcome:
    """What a process left behind, or why it left nothing (``failed``)."""

    folder: Path
    bytes: int = 0
    parameters: int = 0
    seconds: float = 0.0  # from the start of the process to its end
    inside: float = 0.0  # of these, from opening the network to the last linear
    cpu: float = 0.0
    peak: int = 0
    failed: str = ""

    @property
    def weights(self) -> Path:
        return self.folder / "weights.safetensors"


def outcome(
    python: Path, worker: str, job: Mapping[str, Any], kept: Path, more: Mapping[str, str], patience: float
) -> Outcome:
    """Run a worker, or read what it gave before.

    job:      what the worker is told; ``out`` is added.
    more:     versions and sources that decide the outcome besides the job and the worker; ``path``, where there is
              one, is what its interpreter searches too, and ``prefix`` the command that starts it.
    patience: seconds after which the process is ended and counts as failed; such an outcome is not kept.
    """
    sources = "".join((WORKERS / name).read_text(encoding="utf-8") for name in ("protocol.py", worker))
    content = json.dumps([dict(job), dict(more), sources], sort_keys=True)
    folder = (kept / hashlib.sha256(content.encode()).hexdigest()[:16]).absolute()
    stamp = folder / "outcome.json"
    if stamp.is_file():
        return Outcome(folder, **json.loads(stamp.read_text(encoding="utf-8")))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({**job, "out": str(folder)}), encoding="utf-8")
    threads = str(job["threads"])
    environ = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", **({"PYTHONPATH": more["path"]} if "path" in more else {})}
    command = [*shlex.split(more.get("prefix", "")), str(python), str(WORKERS / worker), str(folder / "job.json")]
    before, began = os.times(), time.perf_counter()
    with (folder / "log").open("w", encoding="utf-8") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=log, env=environ, cwd=folder, timeout=patience).returncode
        except subprocess.TimeoutExpired:
            return Outcome(folder, failed=f"ended after {patience:.0f} s")
    seconds, after = time.perf_counter() - began, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    report = folder / "report.json"
    if code or not report.is_file():
        said = reason((folder / "log").read_text(encoding="utf-8", errors="replace"))
        found = {"failed": f"fails here: {said}", "seconds": seconds, "cpu": cpu}
    else:
        said = json.loads(report.read_text(encoding="utf-8"))
        found = {
            "bytes": said["bytes"], "parameters": said["parameters"], "peak": said["peak_bytes"],
            "inside": said["seconds"], "seconds": seconds, "cpu": cpu,
        }  # fmt: skip
    stamp.write_text(json.dumps(found), encoding="utf-8")
    return Outcome(folder, **found)
