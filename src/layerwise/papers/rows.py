"""Evidence rows: ``evidence/<technique>.json`` of the package, checked key by key when read.

    {"technique": "gptq", "paper": "GPTQ", "rows": [{"network": …, "data": …, "metric": …, "setting": recipe,
      "bytes": int, "value": float, "baseline": {"recipe": …, "bytes": int, "value": float}, "seeds": [int],
      "spread": float, "versions": {…}, "command": …}]}

Other keys may be present and are left alone. A technique without a file has no evidence, and neither has one whose
file holds no rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.errors import InputError

FOLDER = Path(__file__).resolve().parents[1] / "evidence"


@dataclass(frozen=True)
class Row:
    """One measured result, with what it is measured against."""

    technique: str
    network: str
    data: str
    metric: str
    setting: str
    bytes: int
    value: float
    baseline_recipe: str
    baseline_bytes: int
    baseline_value: float
    seeds: tuple[int, ...]
    spread: float
    versions: Mapping[str, str]
    command: str

    def as_json(self) -> dict[str, Any]:
        """As the file writes it."""
        return {
            "technique": self.technique, "network": self.network, "data": self.data, "metric": self.metric,
            "setting": self.setting, "bytes": self.bytes, "value": self.value,
            "baseline": {
                "recipe": self.baseline_recipe, "bytes": self.baseline_bytes, "value": self.baseline_value,
            },
            "seeds": list(self.seeds), "spread": self.spread, "versions": dict(self.versions), "command": self.command,
        }  # fmt: skip

    def sentence(self) -> str:
        """``stories5m, KL: 0.0035 at 2.53 MB (gptq:bits=4); rtn:bits=4 0.0069 at 2.53 MB``."""
        spread = f" ± {figure(self.spread)}" if len(self.seeds) > 1 else ""
        return (
            f"{self.network}, {self.metric}: {figure(self.value)}{spread} at {megabytes(self.bytes)} ({self.setting}); "
            f"{self.baseline_recipe}: {figure(self.baseline_value)} at {megabytes(self.baseline_bytes)}"
        )


def figure(value: float) -> str:
    return f"{value:.3g}"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB"


def evidence_rows(technique: str, folder: Path = FOLDER) -> tuple[Row, ...]:
    """The rows of a technique, none where it has no file. Raises ``InputError`` naming the file and the key."""
    path = folder / f"{technique}.json"
    if not path.is_file():
        return ()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not readable JSON: {error}") from None
    if _take(content, "technique", str, path.name) != technique:
        raise InputError(f"{path.name} says it is the evidence of {content['technique']!r}, and must say {technique!r}")
    rows = _take(content, "rows", list, path.name)
    return tuple(_row(technique, row, f"{path.name}, row {i + 1}") for i, row in enumerate(rows))


def _row(technique: str, row: Any, where: str) -> Row:
    baseline = _take(row, "baseline", dict, where)
    seeds = _take(row, "seeds", list, where)
    if not seeds or not all(type(seed) is int for seed in seeds):
        raise InputError(f"{where}: 'seeds' must be a list of whole numbers, not {seeds!r}")
    versions = _take(row, "versions", dict, where)
    if not all(isinstance(version, str) for version in versions.values()):
        raise InputError(f"{where}: 'versions' must name each version by a text, not {versions!r}")
    inside = f"{where}, baseline"
    return Row(
        technique=technique,
        network=_take(row, "network", str, where),
        data=_take(row, "data", str, where),
        metric=_take(row, "metric", str, where),
        setting=_take(row, "setting", str, where),
        bytes=_size(row, where),
        value=_number(row, "value", where),
        baseline_recipe=_take(baseline, "recipe", str, inside),
        baseline_bytes=_size(baseline, inside),
        baseline_value=_number(baseline, "value", inside),
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
