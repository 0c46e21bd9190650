"""Top-1 and KL of plans against uniform rounding and GPTQ at equal size: ResNet-20, a perceptron, a small ViT.

    python benchmarks/vision.py [resnet20 mlp vit] [--bits 4 3 2] [--images 2000] [--evaluate 2000]

Networks and data are read from ``../shared``; what is absent is left out. The ViT is trained on the spot
(``examples/train_mnist_vit.py``, two minutes) unless ``--vit`` names one. Every baseline is
``TECHNIQUE:bits=B,group=64`` on all linears and convolutions, calibrated on every image; the plan's budget is the
baseline's exact size.

Exits with 1 when a plan is larger than its baseline. Losing to a baseline is a finding, not a failure.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.runs import BESIDE
from benchmarks.tables import Table, add_output_options, publish
from examples import train_mnist_vit

import layerwise
from layerwise.acts.apply import predicted_bytes
from layerwise.acts.images import Given
from layerwise.acts.kept import overlay
from layerwise.acts.prepare import Options
from layerwise.acts.refit import refit
from layerwise.acts.uniform import encode_uniform
from layerwise.calibrate.images import Images
from layerwise.cli.shared import Bar
from layerwise.compress import measure_candidates, start
from layerwise.engine.progress import Stopwatch
from layerwise.evaluate.compare import compare
from layerwise.network.network import Network
from layerwise.plan.pareto import Pareto

GROUP = 64
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the colours that ResNet-20 was trained with


class Residual(nn.Module):
    """Two 3 x 3 convolutions; a narrower input is thinned out and its channels are padded with zeros."""

    def __init__(self, narrow: int, wide: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(narrow, wide, 3, stride, 1, bias=False), nn.BatchNorm2d(wide)
        self.conv2, self.bn2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False), nn.BatchNorm2d(wide)
        self.stride, self.pad = stride, (wide - narrow) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        thinned = x[:, :, :: self.stride, :: self.stride]
        return functional.relu(y + functional.pad(thinned, (0, 0, 0, 0, self.pad, self.pad)))


class CifarResNet(nn.Module):
    """ResNet-20 for images ``[n, 3, 32, 32]``: three stages of three blocks, 16, 32 and 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Residual(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Residual(16, 32, 2), Residual(32, 32, 1), Residual(32, 32, 1))
        self.layer3 = nn.Sequential(Residual(32, 64, 2), Residual(64, 64, 1), Residual(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(functional.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def perceptron() -> nn.Sequential:
    """784-256-128-10, for pixels in 0..1."""
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}; all")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], help="widths of the baselines (%(default)s)")
    parser.add_argument("--baselines", nargs="+", default=["rtn", "gptq"], metavar="TECHNIQUE")
    parser.add_argument("--images", type=int, default=2000, help="calibration images at most (%(default)s)")
    parser.add_argument("--evaluate", type=int, default=2000, help="held-out images at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vit", metavar="DIR", help="a vision transformer that train_mnist_vit.py made")
    add_output_options(parser)
    given = parser.parse_args(arguments)
    unknown = [name for name in given.networks if name not in NETWORKS]
    if unknown:
        parser.error(f"there is no network {unknown[0]!r}; choose of {' '.join(NETWORKS)}")
    rows: list[dict[str, Any]] = []
    for name in given.networks or NETWORKS:
        with tempfile.TemporaryDirectory(prefix="layerwise-") as folder:
            found = NETWORKS[name](given, Path(folder))
            if found is None:
                print(f"{name} is left out: its files are not in {BESIDE}", file=sys.stderr)
                continue
            rows += rows_of(name, *found, given, Path(folder))
    tables = [Table.of("Plans against uniform settings of the same size", rows)] if rows else []
    publish(given, tables, {"benchmark": "vision", "rows": rows})
    return int(any(row["bytes"] > row["baseline bytes"] for row in rows))


# ---------------------------------------------------------------- networks

Found = tuple[Network, Images, Images]
"""(network, calibration images, held-out images)."""


def resnet20(given: argparse.Namespace, _: Path) -> Found | None:
    weights, data = BESIDE / "models/resnet20_cifar10/model.safetensors", BESIDE / "data/cifar10"
    if not (weights.is_file() and data.is_dir()):
        return None

    def colours(pixels: Tensor) -> Tensor:
        mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, DEVIATION))
        return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / deviation

    network = CifarResNet()
    network.load_state_dict(load_file(weights))
    calibration = images(data / "train1k_jpeg75.npz", colours, given.images)
    held_out = images(data / "test2k_jpeg75.npz", colours, given.evaluate)
    return layerwise.open(network, (calibration.pixels, calibration.labels)), calibration, held_out


def mlp(given: argparse.Namespace, _: Path) -> Found | None:
    weights, data = BESIDE / "models/mlp_mnist/model.safetensors", BESIDE / "data/mnist"
    if not (weights.is_file() and data.is_dir()):
        return None
    network = perceptron()
    network.load_state_dict(load_file(weights))
    flat: Callable[[Tensor], Tensor] = lambda pixels: pixels.flatten(1).float() / 255  # noqa: E731
    calibration = images(data / "train10k.npz", flat, given.images)
    held_out = images(data / "test10k.npz", flat, given.evaluate)
    return layerwise.open(network, (calibration.pixels, calibration.labels)), calibration, held_out


def vit(given: argparse.Namespace, folder: Path) -> Found | None:
    data, model = BESIDE / "data/mnist", Path(given.vit or folder / "vit")
    if not data.is_dir():
        return None
    if given.vit is None:
        train_mnist_vit.main([str(data / "train10k.npz"), str(data / "test10k.npz"), str(model)])
    calibration = Images("train10k.npz", *(t[: given.images] for t in train_mnist_vit.digits(data / "train10k.npz")))
    held_out = Images("test10k.npz", *(t[: given.evaluate] for t in train_mnist_vit.digits(data / "test10k.npz")))
    return layerwise.open(model), calibration, held_out


NETWORKS: dict[str, Callable[[argparse.Namespace, Path], Found | None]] = {
    "resnet20": resnet20,
    "mlp": mlp,
    "vit": vit,
}


def images(file: Path, prepare: Callable[[Tensor], Tensor], most: int) -> Images:
    with np.load(file, allow_pickle=False) as archive:
        pixels, labels = torch.from_numpy(archive["images"][:most]), torch.from_numpy(archive["labels"][:most])
    return Images(file.name, prepare(pixels).contiguous(), labels.long())


# ---------------------------------------------------------------- measuring


def rows_of(
    name: str, network: Network, calibration: Images, held_out: Images, given: argparse.Namespace, folder: Path
) -> list[dict[str, Any]]:
    """Encode the baselines, plan at their sizes, measure everything in one pass."""
    watch = Stopwatch(Bar(quiet=False))
    options = Options(
        model=network.name, work=str(folder / "work"), seed=given.seed, threads=torch.get_num_threads(), workers=1
    )
    prepared, run, _ = start(options, watch, Given(network, calibration, held_out))
    try:
        found = measure_candidates(prepared, run, watch)
        variants, pairs = {}, []
        for bits in given.bits:
            for technique in given.baselines:
                recipe = f"{technique}:bits={bits},group={GROUP}"
                baseline = encode_uniform(prepared, run, found, recipe, "same", watch)
                allocation = Pareto().allocate(found.tree(), baseline.bytes - prepared.range.fixed)
                recipes = {site: c.recipe for site, c in allocation.sites.items()}
                plan = f"plan {baseline.bytes}"
                variants[recipe] = baseline.weights
                if plan not in variants:
                    variants[plan] = overlay(refit(run, found, recipes, 1, watch), recipes)
                pairs.append((bits, technique, recipe, baseline.bytes, plan, recipes, allocation.damage))
        measured = compare(network, variants, prepared.loss, prepared.evaluation.batches, run.folder)
    finally:
        run.journal.close()
    dense = measured["dense"].metrics
    return [
        {
            "network": name,
            "bits": bits,
            "baseline": technique,
            "baseline bytes": size,
            "bytes": predicted_bytes(network, recipes),
            "dense top-1": dense["top1"],
            "top-1 of baseline": measured[recipe].metrics["top1"],
            "top-1 of plan": measured[plan].metrics["top1"],
            "KL of baseline": measured[recipe].metrics["kl"],
            "KL of plan": measured[plan].metrics["kl"],
            "ratio": measured[plan].metrics["kl"] / measured[recipe].metrics["kl"],
            "predicted/measured": damage / measured[plan].metrics["kl"],
        }
        for bits, technique, recipe, size, plan, recipes, damage in pairs
    ]


if __name__ == "__main__":
    sys.exit(main())
