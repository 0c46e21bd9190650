"""Trained image classifiers, end to end: folding is exact, the artifact is what was predicted, top-1 survives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.vision import DEVIATION, MEAN, CifarResNet, perceptron
from safetensors.torch import load_file
from torch import Tensor

import layerwise
from layerwise.network.module import running

TECHNIQUES = ("two_sided:bits=3,group=64,scale_bits=8", "two_sided:bits=4,group=64,scale_bits=8", "rtn:bits=6,group=0")


def images(file: Path, count: int) -> tuple[Tensor, Tensor]:
    with np.load(file, allow_pickle=False) as archive:
        return torch.from_numpy(archive["images"][:count]).float() / 255, torch.from_numpy(archive["labels"][:count])


def top1(evidence: dict, name: str) -> float:
    return next(row for row in evidence["rows"] if row["name"] == name)["quality"]["top1"]["value"]


@pytest.mark.shared
def test_the_perceptron_keeps_its_accuracy(shared: Path, tmp_path: Path) -> None:
    module = perceptron()
    module.load_state_dict(load_file(shared / "models" / "mlp_mnist" / "model.safetensors"))
    data = shared / "data" / "mnist"
    calibrate, held_out = (
        (pixels.flatten(1), labels)
        for pixels, labels in (images(data / "train10k.npz", 600), images(data / "test10k.npz", 1000))
    )
    result = layerwise.compress(
        module, tmp_path / "out", batches=[calibrate], evaluate=held_out, budget="4bpw", techniques=TECHNIQUES,
        threads=1, workers=1, baseline=False,
    )  # fmt: skip
    assert top1(result.evidence, "plan") > top1(result.evidence, "dense") - 0.01 > 0.95
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size == result.applied.bytes <= result.evidence["budget"]["bytes"]


@pytest.mark.shared
def test_resnet20_is_folded_and_compressed(shared: Path, tmp_path: Path) -> None:
    module = CifarResNet().eval()
    module.load_state_dict(load_file(shared / "models" / "resnet20_cifar10" / "model.safetensors"))
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, DEVIATION))
    calibrate, held_out = (
        ((pixels.permute(0, 3, 1, 2) - mean) / deviation, labels)
        for pixels, labels in (
            images(shared / "data" / "cifar10" / "train1k_jpeg75.npz", 64),
            images(shared / "data" / "cifar10" / "test2k_jpeg75.npz", 120),
        )
    )
    network = layerwise.open(module, [calibrate])
    assert len(network.norms.folded) == 19 and not network.norms.absorbed and len(network.tree.sites) == 20
    with torch.no_grad(), running(network) as run:
        dense, folded = module(calibrate[0][:32]), run(calibrate[0][:32])
    assert float((dense - folded).abs().max()) <= 1e-5 * float(dense.abs().max())
    result = layerwise.compress(
        network, tmp_path / "out", evaluate=held_out, budget="4.5bpw", techniques=TECHNIQUES, threads=1, workers=1,
        baseline=False,
    )  # fmt: skip
    assert top1(result.evidence, "plan") > top1(result.evidence, "dense") - 0.05
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == result.applied.bytes
    packed = layerwise.load(tmp_path / "out", into=CifarResNet())
    with torch.no_grad():
        hits = (packed(held_out[0]).argmax(-1) == held_out[1]).float().mean()
    assert float(hits) == pytest.approx(top1(result.evidence, "plan"), abs=0.011)
