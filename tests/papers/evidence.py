"""Evidence rows for tests: one well-formed file's content, and the same as rows."""

from __future__ import annotations

from typing import Any

from layerwise.evidence.rows import Baseline
from layerwise.papers.rows import Row


def content(technique: str = "gptq") -> dict[str, Any]:
    """What ``evidence/<technique>.json`` holds."""
    return {
        "technique": technique,
        "paper": technique.upper(),
        "rows": [
            {
                "network": "stories <5m>",
                "data": "stories",
                "metric": "KL per token",
                "setting": f"{technique}:bits=4",
                "bytes": 2_530_000,
                "value": 0.0035,
                "baseline": {"recipe": "rtn:bits=4", "bytes": 2_531_000, "value": 0.007},
                "seeds": [0, 1, 2],
                "spread": 0.0002,
                "versions": {"torch": "2.13"},
                "command": f"layerwise bench {technique}",
            }
        ],
    }


def row(technique: str = "gptq") -> Row:
    return Row(
        "stories <5m>", "stories", "KL per token", f"{technique}:bits=4", 2_530_000, 0.0035,
        Baseline("rtn:bits=4", 2_531_000, 0.007), (0, 1, 2), 0.0002, {"torch": "2.13"}, f"layerwise bench {technique}",
        technique,
    )  # fmt: skip


def of_awq(technique: str) -> tuple[Row, ...]:
    """Evidence for one technique alone."""
    return (row("awq"),) if technique == "awq" else ()
