"""A space of vision transformers in which every choice is a leading slice of the largest.

    width w in W, a multiple of HEAD (heads = w / HEAD)        w = 16:  [####............]
    depth d in D, the first d blocks                           w = 32:  [########........]
    ratio r_i in R, of block i: its inner width is w r_i       w = 64:  [################]

``shapes`` is the one place that knows what an architecture stores. The weights of an architecture inside a larger one
(weight entanglement) are the leading ``shape`` of every tensor, so parameters, slices and mixtures all follow from it.
Multiply-adds are what searches are charged for: one of an image through a network is ``macs``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from layerwise.errors import InputError

HEAD = 16  # channels of an attention head
MOST_ARCHITECTURES = 20_000  # a space is enumerated

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """``width`` of the residual stream and the ratio of every block's feed-forward; the depth is their number."""

    width: int
    ratios: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.width}x{'-'.join(map(str, self.ratios))}"

    @property
    def depth(self) -> int:
        return len(self.ratios)


@dataclass(frozen=True)
class Space:
    """Images ``[channels, side, side]`` of ``classes`` classes, cut into squares of ``patch``, and the choices."""

    channels: int = 1
    side: int = 28
    patch: int = 7
    classes: int = 10
    widths: tuple[int, ...] = (16, 32, 48)
    depths: tuple[int, ...] = (2, 3, 4)
    ratios: tuple[int, ...] = (1, 2, 3, 4)

    def __post_init__(self) -> None:
        for name in ("widths", "depths", "ratios"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values)) or min(values) < 1:
                raise InputError(f"--{name} must be rising whole numbers, such as 1,2,4, not {values}")
        if any(width % HEAD for width in self.widths):
            raise InputError(f"--widths must be multiples of {HEAD}, the width of a head, not {self.widths}")
        if self.side % self.patch or self.patch < 1:
            raise InputError(f"images of side {self.side} cannot be cut into patches of {self.patch}; give a divisor")
        if self.channels < 1 or self.classes < 2:
            raise InputError("a space needs a channel or more and two classes or more")
        if len(self.widths) * sum(len(self.ratios) ** d for d in self.depths) > MOST_ARCHITECTURES:
            raise InputError(f"the space has more than {MOST_ARCHITECTURES} architectures; give fewer choices")

    @property
    def grid(self) -> int:
        return self.side // self.patch

    @cached_property
    def largest(self) -> Architecture:
        return Architecture(self.widths[-1], (self.ratios[-1],) * self.depths[-1])

    def architectures(self) -> Iterator[Architecture]:
        for width, depth in itertools.product(self.widths, self.depths):
            for ratios in itertools.product(self.ratios, repeat=depth):
                yield Architecture(width, ratios)

    def code(self, architecture: Architecture) -> torch.Tensor:
        """The choices as values in [0, 1] ``[2 + most blocks]``; a block that is not there has ratio 0."""
        ratios = [r / self.ratios[-1] for r in architecture.ratios]
        ratios += [0.0] * (self.depths[-1] - architecture.depth)
        return torch.tensor([architecture.width / self.widths[-1], architecture.depth / self.depths[-1], *ratios])


def shapes(space: Space, architecture: Architecture) -> Shapes:
    """Name -> shape of everything that the architecture stores; linears are [out, in]."""
    width = architecture.width
    found: Shapes = {"positions": (space.grid**2, width)}
    found |= _linear("patch", width, space.channels * space.patch**2)
    for index, ratio in enumerate(architecture.ratios):
        found |= block_shapes(index, width, ratio)
    return found | _norm("norm", width) | _linear("head", space.classes, width)


def block_shapes(index: int, width: int, ratio: int) -> Shapes:
    at = f"blocks.{index}."
    found = _norm(at + "norm1", width)
    for name in ("query", "key", "value", "out"):
        found |= _linear(at + name, width, width)
    found |= _norm(at + "norm2", width)
    return found | _linear(at + "up", width * ratio, width) | _linear(at + "down", width, width * ratio)


def parameters(space: Space, architecture: Architecture) -> int:
    return sum(math.prod(shape) for shape in shapes(space, architecture).values())


def macs(space: Space, architecture: Architecture, coarse: int = 1) -> int:
    """Multiply-adds of one image; ``coarse``: patches are taken so many times further apart."""
    patches, width = (space.grid // coarse) ** 2, architecture.width
    blocks = sum(block_macs(patches, width, ratio) for ratio in architecture.ratios)
    return patches * space.channels * space.patch**2 * width + blocks + width * space.classes


def block_macs(tokens: int, width: int, ratio: int) -> int:
    return tokens * (4 * width**2 + 2 * width**2 * ratio) + 2 * tokens**2 * width


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
