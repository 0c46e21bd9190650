"""The example language model, calibrated on a little of its text: for what only a trained network shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import layerwise
from layerwise.calibrate.passes import Calibration

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@contextmanager
def calibrated(folder: Path) -> Iterator[Calibration]:
    """docs-lm on a few hundred tokens; ``folder`` gets the text and the work folder."""
    text = folder / "docs.txt"
    text.write_text("".join((EXAMPLES / "docs_calibrate.txt").open().readlines()[:600]))
    calibration = layerwise.calibrate(
        layerwise.open(EXAMPLES / "docs-lm"), str(text), work=folder / "w", sequences=24, length=64, threads=1
    )
    yield calibration
    calibration.journal.close()
