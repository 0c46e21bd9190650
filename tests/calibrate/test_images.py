"""Files of images: what is read, what is refused, and how images are divided."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.vision import random_inputs

from layerwise.calibrate.images import (
    Images,
    image_splits,
    read_images,
    refuse_same_images,
    set_aside_images,
)
from layerwise.errors import InputError

PIXELS = random_inputs(80, 1, 6, 6)
LABELS = torch.arange(80) % 3


def test_both_kinds_of_file_hold_the_same(tmp_path: Path) -> None:
    save_file({"images": PIXELS, "labels": LABELS}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", images=PIXELS.double().numpy(), labels=LABELS.to(torch.uint8).numpy())
    for name in ("a.safetensors", "a.npz"):
        found = read_images(str(tmp_path / name))
        assert torch.equal(found.pixels, PIXELS) and found.labels is not None and torch.equal(found.labels, LABELS)


def test_what_is_not_a_file_of_images_is_refused_in_a_sentence(tmp_path: Path) -> None:
    np.savez(tmp_path / "bytes.npz", images=np.zeros((4, 6, 6), np.uint8))
    np.savez(tmp_path / "nothing.npz", pixels=np.zeros(3))
    np.savez(tmp_path / "labels.npz", images=PIXELS.numpy(), labels=np.zeros(3, np.int64))
    np.savez(tmp_path / "pickled.npz", images=np.array([{}, []], dtype=object))
    np.savez(tmp_path / "infinite.npz", images=np.full((1, 1, 2, 2), np.inf, np.float32))
    (tmp_path / "broken.npz").write_bytes(b"PK no archive")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 40)
    for name, sentence in (
        ("images.pt", "not a file of images"),
        ("absent.npz", "there is no image file"),
        ("bytes.npz", r"uint8 \[4, 6, 6\]; they must be floats"),
        ("nothing.npz", "no entry named images"),
        ("labels.npz", r"whole numbers \[80\]"),
        ("pickled.npz", "not an archive of plain arrays"),
        ("infinite.npz", "not finite"),
        ("broken.npz", "not an archive of plain arrays"),
        ("broken.safetensors", "broken.safetensors"),
    ):
        with pytest.raises(InputError, match=sentence):
            read_images(str(tmp_path / name))


def test_splits_divide_the_images_and_repeat() -> None:
    images = Images("x", PIXELS, LABELS)
    splits = image_splits(images, positions=5, most=10_000, at_once=16, seed=3)
    assert [sum(len(b.tokens) for b in part) for part in (splits.fit, splits.judge, splits.steer)] == [36, 28, 16]
    assert splits.all[0].tokens.shape == (16, 5)
    seen = torch.cat([b.pixels for b in splits.all if b.pixels is not None])
    assert len({image.numpy().tobytes() for image in seen}) == 80
    same, other = (image_splits(images, 5, 10_000, 16, seed) for seed in (3, 4))
    assert same.fingerprint() == splits.fingerprint() != other.fingerprint()
    assert sum(len(b.tokens) for b in image_splits(images, 5, 200, 16, 3).all) == 40
    with pytest.raises(InputError, match="give at least 32"):
        image_splits(Images("few", PIXELS[:9]), 5, 10_000, 16, 0)


def test_held_out_images_are_others() -> None:
    images = Images("x", PIXELS, LABELS)
    kept, held_out = set_aside_images(images, 0)
    assert len(held_out.pixels) == 8 and "set aside" in held_out.source
    refuse_same_images(kept, held_out)
    with pytest.raises(InputError, match="8 of 8 images"):
        refuse_same_images(images, held_out)
