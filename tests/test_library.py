"""The acts as library functions, one after another, as the README shows them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import layerwise


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(calibration text, held-out text) that share no line."""
    from tests.conftest import made_up_sentences

    folder, lines = tmp_path_factory.mktemp("acts"), made_up_sentences()
    for name, part in (("text.txt", lines[:300]), ("held-out.txt", lines[300:])):
        (folder / name).write_text("\n".join(part) + "\n", encoding="utf-8")
    return str(folder / "text.txt"), str(folder / "held-out.txt")


def test_each_act_takes_what_the_one_before_returned(tiny_qwen2: Path, texts: tuple[str, str], tmp_path: Path) -> None:
    network = layerwise.open(tiny_qwen2)
    calibration = layerwise.calibrate(network, texts[0], work=tmp_path / "work", sequences=48, length=32, threads=1)
    found = layerwise.candidates(calibration, techniques=("rtn:bits=3,group=16", "rtn:bits=6,group=16"))
    small, large = layerwise.plan(found, "5.5bpw"), layerwise.plan(found, "8bpw")
    assert large.damage < small.damage and large.bytes > small.bytes

    compressed = layerwise.apply(found, small)
    size = layerwise.save(compressed, tmp_path / "out")
    assert size == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size <= 5.5 * network.tree.parameters / 8

    module = layerwise.load(tmp_path / "out")
    assert type(module).__name__ == "Qwen2ForCausalLM"
    site = next(s for s in network.tree.sites if s.kind == "linear")
    tokens = torch.arange(12).view(1, 12)
    with torch.inference_mode():
        assert torch.isfinite(module(tokens).logits).all()
    assert compressed.weights.read(site.parameter).shape == (site.rows, site.columns)

    quality = layerwise.evaluate(tmp_path / "out", dense=tiny_qwen2, text=texts[1])
    assert quality.bytes == size
    assert quality.artifact["perplexity"] > 0 and 0 < quality.artifact["kl"] < 5
    calibration.journal.close()


def test_a_kept_plan_and_a_fixed_one(tiny_bert: Path, texts: tuple[str, str], tmp_path: Path) -> None:
    network = layerwise.open(tiny_bert)
    calibration = layerwise.calibrate(network, texts[0], work=tmp_path / "work", sequences=48, length=32)
    found = layerwise.candidates(calibration, techniques=("rtn:bits=3,group=16", "rtn:bits=6,group=16"))
    site = "encoder.layer.0.output.dense"
    kept = layerwise.plan(found, "9bpw", keep=[site])
    assert kept.sites[site].recipe == "dense"
    recipe = kept.sites["encoder.layer.1.output.dense"].recipe
    fixed = layerwise.plan(found, "9bpw", fix=[f"{site}={recipe}"])
    assert fixed.sites[site].recipe == recipe
    with pytest.raises(layerwise.InputError, match="smallest feasible"):
        layerwise.plan(found, "1bpw")
    calibration.journal.close()
