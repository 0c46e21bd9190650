"""Evidence files: one a technique, small JSON, written by ``layerwise bench TECHNIQUE --write`` and committed.

    {"technique": "gptq", "paper": "GPTQ", "rows": [Row, …]}

A row says what one setting of the technique measured on one network, beside a baseline of the same size. Rows that
lose are kept: they are what a reader needs to choose. Values are means over calibration seeds, ``spread`` is half of
their range; smaller is better for every metric (``kl``, ``distance``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Baseline:
    """What a setting is held against, measured on the same text after the same calibration."""

    recipe: str
    bytes: int
    value: float


@dataclass(frozen=True)
class Row:
    """One measured setting. ``bytes`` are those of the whole weights file; of several seeds' files the largest."""

    network: str
    data: str
    metric: str
    setting: str
    bytes: int
    value: float
    baseline: Baseline
    seeds: tuple[int, ...]
    spread: float
    versions: dict[str, str]
    command: str

    @property
    def ratio(self) -> float | None:
        """Loss over the baseline's loss: below one the technique is better; None where the baseline loses nothing."""
        return self.value / self.baseline.value if self.baseline.value > 0 else None


@dataclass(frozen=True)
class Evidence:
    """What is known of a technique; ``paper`` is its paper's name in the ledger."""

    technique: str
    paper: str
    rows: tuple[Row, ...]

    def text(self) -> str:
        """The file, with a newline at its end."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def replacing(self, rows: Sequence[Row]) -> Evidence:
        """With all rows of the new rows' networks and settings replaced by them."""
        new = {(row.network, row.setting) for row in rows}
        kept = tuple(row for row in self.rows if (row.network, row.setting) not in new)
        return Evidence(self.technique, self.paper, (*kept, *rows))


def evidence_file(technique: str, folder: Path = FOLDER) -> Path:
    return folder / f"{technique}.json"


def techniques_with_evidence(folder: Path = FOLDER) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.json"))


def read_evidence(technique: str, folder: Path = FOLDER) -> Evidence | None:
    """A technique's evidence; None where there is none. ``ValueError`` for a file that is not of this form."""
    path = evidence_file(technique, folder)
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return Evidence(value["technique"], value["paper"], tuple(map(_row, value["rows"])))
    except (KeyError, TypeError, ValueError) as reason:
        raise ValueError(f"{path.name} is not an evidence file: {reason}") from None


def write_evidence(evidence: Evidence, folder: Path = FOLDER) -> Path:
    """Write a technique's file; returns its path."""
    path = evidence_file(evidence.technique, folder)
    part = path.with_suffix(".json.part")
    part.write_text(evidence.text(), encoding="utf-8")
    part.replace(path)
    return path


def _row(value: dict[str, Any]) -> Row:
    return Row(**{**value, "baseline": Baseline(**value["baseline"]), "seeds": tuple(value["seeds"])})
