"""The data of a run on a network that reads images: what it is calibrated on, and what it is measured with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from layerwise.calibrate.images import Images, image_splits, read_images, refuse_same_images, set_aside_images
from layerwise.calibrate.splits import Splits
from layerwise.calibrate.text import DEFAULT
from layerwise.errors import InputError
from layerwise.network.module import ModuleNetwork, batches_of_inputs, scores
from layerwise.network.network import Network
from layerwise.network.skeleton import first_sentence
from layerwise.network.streaming import Batch, Streamer

IMAGES_AT_ONCE = 32


@dataclass(frozen=True)
class Given:
    """What was handed over from Python instead of being named in the options.

    network:     an open network; None opens ``options.model``.
    calibration, evaluation: images; None reads the files that the options name.
    """

    network: Network | None = None
    calibration: Images | None = None
    evaluation: Images | None = None


class Asked(Protocol):
    """The options that matter here."""

    @property
    def calibrate(self) -> str: ...
    @property
    def evaluate(self) -> str | None: ...
    @property
    def sequences(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class ImageData:
    """Splits of the calibration images and batches of the held-out ones, with where each come from."""

    source: str
    splits: Splits
    held_out: str
    batches: tuple[Batch, ...]
    same_source: bool


def image_data(network: Network, given: Given, asked: Asked) -> ImageData:
    """Read, check and divide the images; without held-out ones a tenth is set aside.

    ``sequences * length`` is the most positions that are calibrated on, as for text.
    """
    if given.calibration is None and asked.calibrate == DEFAULT:
        raise InputError(
            f"{network.architecture} reads images; give --calibrate a .safetensors or .npz file with images "
            f"[n, c, h, w] as floats"
        )
    images = given.calibration or read_images(asked.calibrate)
    held_out, same_source = given.evaluation, False
    if held_out is None and asked.evaluate is not None:
        held_out = read_images(asked.evaluate)
    if held_out is None:
        (images, held_out), same_source = set_aside_images(images, asked.seed), True
    else:
        refuse_same_images(images, held_out)
    positions, at_once = positions_of(network, images), images_at_once(network)
    splits = image_splits(images, positions, asked.sequences * asked.length, at_once, asked.seed)
    positions = positions_of(network, held_out)
    batches = batches_of_inputs(held_out.pixels, held_out.labels, at_once, positions)
    return ImageData(images.source, splits, held_out.source, batches, same_source)


def images_at_once(network: Network) -> int:
    return network.at_once if isinstance(network, ModuleNetwork) else IMAGES_AT_ONCE


def positions_of(network: Network, images: Images) -> int:
    """Positions of the hidden state that the network makes of an image; ``InputError`` where it does not take it."""
    if isinstance(network, ModuleNetwork):
        scores(network.original, images.pixels[:1])
        return 1
    try:
        with Streamer(network).head_of_network() as enter:
            return int(enter(batches_of_inputs(images.pixels[:1], None, 1)[0], 0)[0].shape[1])
    except (RuntimeError, ValueError) as reason:
        raise InputError(
            f"images of {images.source} have shape {list(images.pixels.shape[1:])}, which {network.architecture} does "
            f"not take: {first_sentence(reason)}"
        ) from None
