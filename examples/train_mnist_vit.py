r"""Train a small vision transformer on MNIST, and write images to calibrate it on and to evaluate it with.

    python examples/train_mnist_vit.py TRAIN.npz TEST.npz OUT [--epochs 8] [--seed 0]

The archives hold ``images`` (uint8 ``[n, 28, 28]``) and ``labels`` (``[n]``). OUT becomes a checkpoint directory with
``calibrate.safetensors`` (training images) and ``heldout.safetensors`` (test images) beside it, so that

    layerwise compress OUT OUT-4bpw --budget 4bpw --calibrate OUT/calibrate.safetensors \
        --evaluate OUT/heldout.safetensors

compresses it. Four blocks of width 64 over 7 x 7 patches, 0.2 million parameters: a minute or two on one core. No
weights are kept in the repository, since MNIST's licence (CC BY-SA) is not the project's.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

CONFIG = {
    "image_size": 28,
    "patch_size": 7,
    "num_channels": 1,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_labels": 10,
    "initializer_range": 0.1,  # the usual 0.02 is for much wider networks, and learns slowly here
}
MEAN, DEVIATION = 0.1307, 0.3081  # of MNIST's training pixels
CALIBRATION_IMAGES = 2000
BATCH, RATE = 64, 2e-3


def digits(file: Path) -> tuple[Tensor, Tensor]:
    """(images ``[n, 1, 28, 28]`` normalised, labels ``[n]``) of an archive."""
    with np.load(file, allow_pickle=False) as archive:
        pixels, labels = torch.from_numpy(archive["images"]), torch.from_numpy(archive["labels"])
    return (pixels.float().unsqueeze(1) / 255 - MEAN) / DEVIATION, labels.long()


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images moved by up to a pixel, all of a batch alike: what keeps so small a training set from being learnt by
    heart."""
    down, right = (int(torch.randint(-1, 2, (1,), generator=generator)) for _ in range(2))
    return images.roll((down, right), (2, 3))


def train(images: Tensor, labels: Tensor, epochs: int, seed: int) -> ViTForImageClassification:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ViTForImageClassification(ViTConfig(**CONFIG))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.05)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    network.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for start in range(0, len(order) - BATCH + 1, BATCH):
            index = order[start : start + BATCH]
            logits = network(shifted(images[index], generator)).logits
            loss = torch.nn.functional.cross_entropy(logits, labels[index])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: ViTForImageClassification, images: Tensor, labels: Tensor) -> float:
    hits = [(network(a).logits.argmax(1) == b).sum() for a, b in zip(images.split(500), labels.split(500), strict=True)]
    return float(sum(hits)) / len(images)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("train", type=Path, help="archive of training images")
    parser.add_argument("test", type=Path, help="archive of test images")
    parser.add_argument("out", type=Path, help="checkpoint directory to write")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training images (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    images, labels = digits(given.train)
    began = time.perf_counter()
    network = train(images, labels, given.epochs, given.seed)
    held_out = digits(given.test)
    print(f"top-1 {accuracy(network, *held_out):.4f} after {time.perf_counter() - began:.0f} s")
    network.save_pretrained(given.out)
    kept = images[:CALIBRATION_IMAGES].contiguous(), labels[:CALIBRATION_IMAGES].contiguous()
    for name, (pixels, classes) in (("calibrate", kept), ("heldout", held_out)):
        save_file({"images": pixels, "labels": classes}, given.out / f"{name}.safetensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
