"""A tiny network searched over a few recipes, with what published rules read off it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from layerwise.acts.measuring import NetworkMeasures
from layerwise.acts.prepare import Options
from layerwise.compress import measure_candidates, start
from layerwise.engine.progress import Stopwatch


@contextmanager
def measures_of(model: Path, text: Path, work: Path, recipes: Sequence[str], budget: str) -> Iterator[NetworkMeasures]:
    """Calibrate ``model`` on 48 sequences of ``text`` and encode ``recipes`` at every linear."""
    options = Options(
        str(model), budget=budget, techniques=tuple(recipes), calibrate=str(text), sequences=48, length=32,
        threads=1, workers=1, work=str(work),
    )  # fmt: skip
    watch = Stopwatch(None)
    prepared, calibration, _ = start(options, watch)
    found = measure_candidates(prepared, calibration, watch)
    yield NetworkMeasures(calibration, found, "candidates", watch)
    calibration.journal.close()
