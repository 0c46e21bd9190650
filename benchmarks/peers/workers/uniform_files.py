"""Our uniform GPTQ up to the written artifact: the acts of ``layerwise compress`` but the proof on held-out text.

    python uniform_files.py JOB.json

A peer that only writes measures nothing, so this is what its time is held against; the whole command is timed as well.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from layerwise.acts.apply import apply_plan
from layerwise.acts.prepare import Options
from layerwise.compress import allocate, measure_candidates, start
from layerwise.engine.memory import large_apart, one_pool
from layerwise.engine.progress import Stopwatch
from layerwise.network.artifact import staged
from layerwise.network.light_imports import own_process


def main() -> None:
    one_pool()  # as the command does
    own_process()
    options = Options(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    watch = Stopwatch()
    with large_apart():
        prepared, calibration, fingerprint = start(options, watch)
        candidates = measure_candidates(prepared, calibration, watch)
        tree = candidates.tree()
        allocation, budget = allocate(prepared, calibration, candidates, tree, watch)
        with staged(Path(options.out), options.force) as folder:
            apply_plan(prepared, candidates, allocation, tree, budget, folder, fingerprint)
        calibration.journal.close(remove=True)


if __name__ == "__main__":
    main()
