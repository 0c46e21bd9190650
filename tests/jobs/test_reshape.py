"""``layerwise reshape``: what is written is the surgeon's network, and what cannot be is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from layerwise.acts.prepare import Options
from layerwise.errors import InputError
from layerwise.jobs.reshape import RESHAPED, reshape
from layerwise.network.load import load
from layerwise.network.network import open_network


def options(model: Path, out: Path) -> Options:
    return Options(model=str(model), out=str(out), sequences=96, length=16, threads=1, workers=1)


def test_fewer_blocks_are_a_plain_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    found = reshape(options(tiny_llama, tmp_path / "out"), "drop_block:count=1")
    before, after = found.blocks
    assert after == before - 1 == len(open_network(str(tmp_path / "out")).tree.blocks)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert found.rows[1]["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert found.rows[1]["quality"]["kl"]["value"] > found.rows[0]["quality"]["kl"]["value"] == 0
    assert json.loads((tmp_path / "out" / RESHAPED).read_text())["surgeon"] == found.surgeon
    assert not (tmp_path / "out.work").exists()
    with torch.no_grad():
        assert load(str(tmp_path / "out"))(torch.tensor([[5, 6, 7]]))[0].isfinite().all()


@pytest.mark.parametrize(
    ("surgeon", "says"),
    [
        ("drop_block", "say how many"),
        ("drop_block:count=9", "remove fewer"),
        ("gptq", "no network another shape"),
        ("nothing", "no technique named"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    tiny_llama: Path, tmp_path: Path, surgeon: str, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        reshape(options(tiny_llama, tmp_path / "out"), surgeon)
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".out*"))
