"""What a benchmark is run on: a checkpoint with its texts, or by name one of the networks that see, with its images."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.runs import BESIDE, texts
from benchmarks.vision import NETWORKS

from layerwise.acts.images import Given
from layerwise.errors import InputError


def add_image_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=2000, help="images of either kind at most (%(default)s)")
    parser.add_argument("--vit", metavar="DIR", help="for vit: one that examples/train_mnist_vit.py made")


@contextmanager
def data_of(given: argparse.Namespace) -> Iterator[tuple[str, str, Given]]:
    """(calibration text, held-out text, what is handed over instead of them).

    A folder is a checkpoint, read with its texts; any other name is one of ``vision.py``'s, with images of ours.
    """
    if given.network not in NETWORKS or Path(given.network).exists():
        with texts(given) as (calibrate, evaluate):
            yield calibrate, evaluate, Given()
        return
    with tempfile.TemporaryDirectory(prefix="layerwise-") as folder:
        asked = argparse.Namespace(images=given.images, evaluate=given.images, vit=given.vit)
        found = NETWORKS[given.network](asked, Path(folder))
        if found is None:
            raise InputError(f"{given.network} needs its files in {BESIDE}; name a checkpoint folder instead")
        network, calibration, held_out = found
        yield calibration.source, held_out.source, Given(network, calibration, held_out)
