"""How long norms take: LayerNorm, RMSNorm in its place, and the compressed RMSNorm with one number less.

    python benchmarks/norms.py [--width 384] [--sequences 64] [--length 256] [--rounds 15] [--threads 1] [--json]

One forward of a tensor ``[sequences, length, width]`` each, taken in turn so that a busy machine slows all of them
alike; printed is the median of the rounds, and the whole forward of a small ViT with each kind of norm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

from layerwise.network.norms import Basis, CompressedRmsNorm, RmsNorm
from layerwise.recipe import parse_technique
from layerwise.roles import NetworkRewrite


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("width", 384), ("sequences", 64), ("length", 256), ("rounds", 15), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with torch.inference_mode():
        result = {
            **vars(given),
            "torch": torch.__version__,
            "norm, ms": medians(norms(given), given.rounds),
            "whole forward, ms": medians(forwards(given), given.rounds),
        }
    if given.json:
        print(json.dumps(result))
        return 0
    for title in ("norm, ms", "whole forward, ms"):
        print(title)
        first = next(iter(result[title].values()))
        for name, value in result[title].items():
            print(f"  {name:<20} {value:9.2f}   {value / first:.2f} of LayerNorm's")
    return 0


def norms(given: argparse.Namespace) -> dict[str, Callable[[], object]]:
    width = given.width
    shape = (given.sequences, given.length, width)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x -= x.mean(-1, keepdim=True)
    short = x[..., :-1].contiguous()
    layer = torch.nn.LayerNorm(width)
    root = RmsNorm(width, layer.eps, layer.weight, layer.bias)
    return {
        "LayerNorm": lambda: layer(x),
        "RMSNorm": lambda: root(x),
        "torch's RMSNorm": lambda: functional.rms_norm(x, (width,), layer.weight, layer.eps) + layer.bias,
        "CRMSNorm, drop": lambda made=CompressedRmsNorm(Basis(width, False), layer.eps): made(short),
        "CRMSNorm, rotate": lambda made=CompressedRmsNorm(Basis(width, True), layer.eps): made(short),
    }


def forwards(given: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """A ViT of two blocks on 64 patches, a few images at a time."""
    from transformers import ViTConfig, ViTForImageClassification

    width = max(64, given.width // 64 * 64)
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=width, num_hidden_layers=2, num_attention_heads=width // 64, intermediate_size=4 * width,
        image_size=32, patch_size=4,
    )  # fmt: skip
    images = torch.randn(max(1, given.sequences // 4), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    made: dict[str, torch.nn.Module] = {"LayerNorm": ViTForImageClassification(config).eval()}
    for name, text in (
        ("RMSNorm", "pre_rmsnorm"),
        ("CRMSNorm, drop", "pre_crmsnorm"),
        ("CRMSNorm, rotate", "pre_crmsnorm:basis=rotate"),
    ):
        rewrite = parse_technique(text)
        assert isinstance(rewrite, NetworkRewrite)
        made[name] = rewrite.convert(made["LayerNorm"])
    return {name: lambda module=module: module(images) for name, module in made.items()}


def medians(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each call, interleaved, after one round that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i:
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(statistics.median(times), 3) for name, times in taken.items()}


if __name__ == "__main__":
    sys.exit(main())
