"""Evidence files: one a technique, small JSON, written by ``layerwise bench TECHNIQUE --write`` and committed.

    {"technique": "gptq", "paper": "GPTQ", "rows": [Row, …]}

A row says what one setting of the technique measured on one network, beside a baseline of the same size. Rows that
lose are kept: they are what a reader needs to choose. Values are means over calibration seeds, ``spread`` is half of
their range; smaller is better for every metric (``kl``, ``distance``, and what a role measures in its own).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerwise.errors import InputError

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
    """A technique's evidence, checked key by key; None where there is none.

    Raises ``InputError`` naming the file and the key that is wrong. Other keys may be present and are left alone.
    """
    path = evidence_file(technique, folder)
    if not path.is_file():
        return None
    try:
        return _evidence(json.loads(path.read_text(encoding="utf-8")), path)
    except InputError as reason:
        raise InputError(f"{path.name} is not an evidence file: {reason}") from None
    except ValueError as reason:
        raise InputError(f"{path.name} is not an evidence file: it is not readable JSON: {reason}") from None


def write_evidence(evidence: Evidence, folder: Path = FOLDER) -> Path:
    """Write a technique's file; returns its path."""
    path = evidence_file(evidence.technique, folder)
    part = path.with_suffix(".json.part")
    part.write_text(evidence.text(), encoding="utf-8")
    part.replace(path)
    return path


def _evidence(content: Any, path: Path) -> Evidence:
    technique = _take(content, "technique", str, path.name)
    if technique != path.stem:
        raise InputError(f"it says it is the evidence of {technique!r}, and must say {path.stem!r}")
    rows = _take(content, "rows", list, path.name)
    return Evidence(
        technique,
        _take(content, "paper", str, path.name),
        tuple(_row(row, f"{path.name}, row {i + 1}") for i, row in enumerate(rows)),
    )


def _row(row: Any, where: str) -> Row:
    baseline = _take(row, "baseline", dict, where)
    seeds = _take(row, "seeds", list, where)
    if not seeds or not all(type(seed) is int for seed in seeds):
        raise InputError(f"{where}: 'seeds' must be a list of whole numbers, not {seeds!r}")
    versions = _take(row, "versions", dict, where)
    if not all(isinstance(version, str) for version in versions.values()):
        raise InputError(f"{where}: 'versions' must name each version by a text, not {versions!r}")
    inside = f"{where}, baseline"
    return Row(
        network=_take(row, "network", str, where),
        data=_take(row, "data", str, where),
        metric=_take(row, "metric", str, where),
        setting=_take(row, "setting", str, where),
        bytes=_size(row, where),
        value=_number(row, "value", where),
        baseline=Baseline(
            _take(baseline, "recipe", str, inside), _size(baseline, inside), _number(baseline, "value", inside)
        ),
        seeds=tuple(seeds),
        spread=_number(row, "spread", where),
        versions=versions,
        command=_take(row, "command", str, where),
    )


def _take(value: Any, key: str, kind: type, where: str) -> Any:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, kind) or isinstance(found, bool) or found == "":
        wanted = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}[kind]
        raise InputError(f"{where}: {key!r} must be {wanted}, not {found!r}")
    return found


def _size(value: Any, where: str) -> int:
    found: int = _take(value, "bytes", int, where)
    if found <= 0:
        raise InputError(f"{where}: 'bytes' must be positive, not {found}")
    return found


def _number(value: Any, key: str, where: str) -> float:
    found = value.get(key)
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise InputError(f"{where}: {key!r} must be a finite number, not {found!r}")
    return float(found)
