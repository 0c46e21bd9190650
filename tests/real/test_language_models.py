"""Trained language models, end to end: what is predicted comes true, and the plan beats the plain baseline.

Short calibration and a coarse menu keep these quick; the figures that are claimed come from ``benchmarks``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.command import compress

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
COARSE = ",".join(f"two_sided:bits={b},group={g},scale_bits=8" for b, g in ((2, 32), (3, 64), (4, 64), (5, 128)))


def measured(model: Path, out: Path, text: Path, held_out: Path, *options: str | Path) -> tuple[dict[str, Any], float]:
    """(evidence, mean KL of what was made) of a run."""
    small = ("--threads", "1", "--workers", "2", "--sequences", "32", "--length", "128", "--no-baseline")
    done = compress(model, out, text, "--evaluate", held_out, *options, small=small)
    assert done.code == 0, done.err
    evidence = json.loads((out / "evidence.json").read_text())
    row = next(row for row in evidence["rows"] if row["name"] == "plan")
    assert row["bytes"] == (out / "model.safetensors").stat().st_size <= evidence["budget"]["bytes"]
    return evidence, row["quality"]["kl"]["value"]


@pytest.mark.shared
def test_stories260k_beats_uniform_gptq_at_its_size(shared: Path, tmp_path: Path) -> None:
    model, data = shared / "models" / "stories260k", shared / "data" / "tinystories"
    text, held_out = data / "train_head.txt", data / "valid.txt"
    uniform, kl = measured(model, tmp_path / "uniform", text, held_out, "--uniform", "gptq:bits=4,group=64")
    budget = f"{uniform['budget']['bytes']}B"
    plan, less = measured(model, tmp_path / "plan", text, held_out, "--budget", budget)
    assert less < kl
    assert plan["predicted"]["damage"] == pytest.approx(less, rel=0.4)


def test_the_loss_of_docs_lm_is_as_predicted(docs_lm: Path, tmp_path: Path) -> None:
    text, held_out = EXAMPLES / "docs_calibrate.txt", EXAMPLES / "docs_heldout.txt"
    evidence, kl = measured(docs_lm, tmp_path / "OUT", text, held_out, "--budget", "4bpw", "--techniques", COARSE)
    assert evidence["predicted"]["damage"] == pytest.approx(kl, rel=0.4)
