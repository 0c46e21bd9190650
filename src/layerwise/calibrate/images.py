"""Images to calibrate on and to evaluate with: reading them, and dividing them into fit, judge and steer.

A file is ``.safetensors`` or ``.npz`` with ``images`` (floats ``[n, channels, height, width]``, normalised as the
network reads them) and, if top-1 is wanted, ``labels`` (whole numbers ``[n]``). An example of the loss is an image.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from layerwise.calibrate.splits import HELD_OUT, SHARES, Splits
from layerwise.errors import InputError
from layerwise.network.module import batches_of_inputs
from layerwise.network.safetensors_file import read, read_header
from layerwise.network.skeleton import first_sentence

FEWEST = 32  # images; of fewer, a split of a fifth measures nothing
TOLERATED_OVERLAP = 0.01
ENDINGS = (".safetensors", ".npz")


@dataclass(frozen=True)
class Images:
    """``pixels`` ``[n, ...]`` float32 and ``labels`` ``[n]`` int64 or None, and where they come from.

    raw: the pixels were bytes, and are still from 0 to 255.
    """

    source: str
    pixels: Tensor
    labels: Tensor | None = None
    raw: bool = False

    def take(self, index: Tensor) -> Images:
        return replace(
            self, pixels=self.pixels[index], labels=None if self.labels is None else self.labels[index]
        )  # fmt: skip


def read_images(source: str, raw: bool = False) -> Images:
    """Read a file of images. Raises ``InputError`` for another kind of file, and for one that does not hold them.

    raw: bytes ``[n, height, width]`` or ``[n, height, width, channels]`` are taken too, where the reader normalises.
    """
    path = Path(source)
    if path.suffix not in ENDINGS:
        raise InputError(
            f"{source} is not a file of images; give a .safetensors or .npz file with images [n, c, h, w] as floats "
            f"and, for top-1, labels [n]"
        )
    if not path.is_file():
        raise InputError(f"there is no image file {source}")
    found = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
    pixels, labels = found.get("images"), found.get("labels")
    if pixels is None:
        raise InputError(f"{source} has no entry named images; it holds {', '.join(sorted(found)) or 'nothing'}")
    if is_raw := raw and pixels.dtype == torch.uint8 and pixels.dim() in (3, 4):
        pixels = (pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)).float()
    if pixels.dim() != 4 or not pixels.is_floating_point():
        raise InputError(
            f"images of {source} are {str(pixels.dtype).removeprefix('torch.')} {list(pixels.shape)}; they must be "
            f"floats [n, channels, height, width], normalised as the network reads them"
        )
    if labels is not None and (labels.dim() != 1 or labels.is_floating_point() or len(labels) != len(pixels)):
        raise InputError(f"labels of {source} must be whole numbers [{len(pixels)}], one an image")
    pixels = pixels.float().contiguous()
    if not bool(pixels.isfinite().all()):
        raise InputError(f"{source} holds images with values that are not finite")
    return Images(source, pixels, None if labels is None else labels.to(torch.int64), is_raw)


def read_labels(source: str) -> Tensor:
    """The labels ``[n]`` int64 of a file that may hold nothing else. Raises ``InputError`` as ``read_images`` does."""
    path = Path(source)
    if path.suffix not in ENDINGS or not path.is_file():
        raise InputError(f"there is no .safetensors or .npz file {source} with labels")
    labels = (_read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)).get("labels")
    if labels is None or labels.dim() != 1 or labels.is_floating_point():
        raise InputError(f"{source} must have an entry named labels, whole numbers [n]")
    return labels.to(torch.int64)


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {n: torch.from_numpy(np.ascontiguousarray(archive[n])) for n in archive.files if n in _WANTED}
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as reason:
        raise InputError(f"{path} is not an archive of plain arrays: {first_sentence(reason)}") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    return {name: read(info) for name, info in read_header(path)[0].items() if name in _WANTED}


_WANTED = ("images", "labels")


def set_aside_images(images: Images, seed: int) -> tuple[Images, Images]:
    """(calibration images, held-out images of the same source): a tenth, drawn at random."""
    order = torch.randperm(len(images.pixels), generator=torch.Generator().manual_seed(seed))
    count = max(1, round(HELD_OUT * len(order)))
    held_out = replace(images.take(order[:count]), source=f"{images.source} (set aside)")
    return images.take(order[count:]), held_out


def image_splits(images: Images, positions: int, most: int, at_once: int, seed: int) -> Splits:
    """Fit, judge and steer batches of at most ``most`` positions in all.

    positions: of one image's hidden state (patches and class token); one where the network runs whole.
    """
    order = torch.randperm(len(images.pixels), generator=torch.Generator().manual_seed(seed))
    order = order[: max(FEWEST, most // positions)]
    if len(order) < FEWEST:
        raise InputError(f"{images.source} has {len(order)} images to calibrate on; give at least {FEWEST}")
    found, start = {}, 0.0
    for name, share in SHARES.items():
        part = images.take(order[round(start * len(order)) : round((start + share) * len(order))])
        found[name] = batches_of_inputs(part.pixels, part.labels, at_once, positions)
        start += share
    return Splits(**found)


def refuse_same_images(calibration: Images, held_out: Images) -> None:
    """``InputError`` where images that are evaluated on were calibrated on."""
    known = set(map(_digest, calibration.pixels))
    shared = sum(_digest(image) in known for image in held_out.pixels)
    if shared > TOLERATED_OVERLAP * len(held_out.pixels):
        raise InputError(
            f"{shared} of {len(held_out.pixels)} images of {held_out.source} are also in {calibration.source}; "
            f"evaluate on images that were not calibrated on"
        )


def _digest(image: Tensor) -> bytes:
    return hashlib.sha256(image.contiguous().numpy().tobytes()).digest()
