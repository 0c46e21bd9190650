"""Evidence rows as the ledger shows them: what was measured, and the technique that measured it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerwise.evidence import rows as evidence

FOLDER = evidence.FOLDER


@dataclass(frozen=True)
class Row(evidence.Row):
    """One measured result, with what it is measured against."""

    technique: str

    def as_json(self) -> dict[str, Any]:
        """As the file writes it, and the technique."""
        return {**asdict(self), "seeds": list(self.seeds)}

    def sentence(self) -> str:
        """``stories5m, KL: 0.0035 at 2.53 MB (gptq:bits=4); rtn:bits=4 0.0069 at 2.53 MB``."""
        spread = f" ± {figure(self.spread)}" if len(self.seeds) > 1 else ""
        return (
            f"{self.network}, {self.metric}: {figure(self.value)}{spread} at {megabytes(self.bytes)} ({self.setting}); "
            f"{self.baseline.recipe}: {figure(self.baseline.value)} at {megabytes(self.baseline.bytes)}"
        )


def figure(value: float) -> str:
    return f"{value:.3g}"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB"


def evidence_rows(technique: str, folder: Path = FOLDER) -> tuple[Row, ...]:
    """The rows of a technique, none where it has no file. Raises ``InputError`` naming the file and the key."""
    found = evidence.read_evidence(technique, folder)
    return tuple(Row(**vars(row), technique=technique) for row in found.rows) if found else ()
