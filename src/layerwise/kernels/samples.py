"""Random matrices in every form that has a kernel: for the self-test and for the benchmark."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.errors import InputError
from layerwise.kernels.matrix import Canonical, PackedMatrix
from layerwise.kernels.sparse import Kept, SparseMatrix

STATES, STRIP = 256, 32  # of a trellis: the states of its codes, and rows that are a ring
MOST_COPIES = 4096  # of one matrix, to be read from memory and not from a cache


@dataclass(frozen=True)
class Sample:
    """``bits`` a code and whole zeros; or none (``symmetric``), a table of ``levels``, ``trits``, a ``trellis``."""

    bits: int
    group: int = 128
    symmetric: bool = False
    levels: bool = False
    trits: bool = False
    trellis: bool = False

    @property
    def whole(self) -> bool:
        """Whether activations become whole numbers: int8 ones are then allowed."""
        return not self.levels

    def packed(self, rows: int, columns: int) -> PackedMatrix:
        """One for the kernels."""
        return PackedMatrix(self.draw(rows, columns))

    def draw(self, rows: int, columns: int, seed: int = 0) -> Canonical:
        """A matrix of random codes, scales and zeros (never zero pages, which the machine would share)."""
        g = torch.Generator().manual_seed(seed)
        group = min(self.group, columns)
        groups = -(-columns // group)
        width = -(-columns // 5) if self.trits else sum(-(-columns * w // 8) for w in (8, 4, 2, 1) if self.bits & w)
        scale = torch.rand(rows, groups, generator=g).add(0.5).mul(2.0**-self.bits).half()
        none = self.symmetric or self.levels or self.trits or self.trellis
        whole = None if none else _bytes(rows, groups, 2**self.bits, g)
        return Canonical(
            rows, columns, self.bits, group, _bytes(rows, width, 256, g), scale, zero=whole,
            levels=torch.linspace(-1, 1, 16) if self.levels else None,
            centre=1 if self.trits else 128 if self.trellis else 2 ** (self.bits - 1), trits=self.trits,
            values=_bytes(1, STATES, STATES, g)[0].view(torch.int8) if self.trellis else None,
        )  # fmt: skip


SAMPLES = {
    "int8": Sample(8),
    "int4": Sample(4),
    "int4 symmetric": Sample(4, symmetric=True),
    "int3": Sample(3),
    "int2": Sample(2),
    "levels4": Sample(4, levels=True),
    "ternary": Sample(2, trits=True),
    "trellis4": Sample(4, trellis=True),
    "trellis3": Sample(3, trellis=True),
    "trellis2": Sample(2, trellis=True),
}
GPU_SAMPLES = tuple(name for name, sample in SAMPLES.items() if not sample.trellis)  # which Triton's kernels multiply


@dataclass(frozen=True)
class SparseSample:
    """A matrix of which half is kept, anywhere: fp16 values, or with ``bits`` codes in groups of 64 columns."""

    bits: int = 0
    whole = False

    def packed(self, rows: int, columns: int) -> SparseMatrix:
        """One for the kernels."""
        return SparseMatrix(self.draw(rows, columns)[0])

    def draw(self, rows: int, columns: int, seed: int = 0) -> tuple[Kept, Tensor]:
        """A matrix of random entries, and what it stands for: float32 [rows, columns]."""
        g = torch.Generator().manual_seed(seed)
        mask = torch.rand(rows, columns, generator=g) < 0.5
        if not self.bits:
            weight = torch.randn(rows, columns, generator=g).half()
            return Kept(mask, weight[mask]), weight * mask.float()
        codes, group = _bytes(rows, columns, 2**self.bits, g), min(64, columns)
        scale = torch.rand(rows, -(-columns // group), generator=g) + 0.5
        floor = torch.rand(scale.shape, generator=g)
        place, sign = torch.arange(columns) // group, 2 ** (self.bits - 1)
        size = ((codes % sign).float() + floor[:, place]) * scale[:, place]
        dense = torch.where(codes >= sign, -size, size) * mask
        return Kept(mask, codes[mask], self.bits, group, scale, floor), dense


SPARSE_SAMPLES = {"half kept, fp16": SparseSample(), "half kept, 4 bits": SparseSample(4)}


def reference(stored: Canonical) -> Tensor:
    """What ``stored`` (of one plane, with fp16 scales) stands for, by torch: float32 [rows, columns]."""
    if stored.trits:
        powers = torch.tensor([1, 3, 9, 27, 81])
        codes = (3 * (stored.codes.long()[:, :, None] * powers % 256) >> 8).flatten(1)[:, : stored.columns]
    else:
        codes = _unpacked(stored)
    group = torch.arange(stored.columns) // stored.group
    scale = stored.scale.float()[:, group]
    if stored.levels is not None:
        return stored.levels[codes] * scale
    if stored.values is not None:
        return stored.values.float()[_states(codes, stored.bits)] * scale
    zero = float(stored.centre) if stored.zero is None else stored.zero.float()[:, group]
    return (codes - zero) * scale


def _states(codes: Tensor, bits: int) -> Tensor:
    strips = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % STRIP)).view(-1, STRIP, codes.shape[1])
    states = torch.stack([strips.roll(back, 1) << back * bits for back in range(-(-8 // bits))]).sum(0) % STATES
    return states.flatten(0, 1)[: len(codes)]


def _unpacked(stored: Canonical) -> Tensor:
    codes = torch.zeros(stored.rows, stored.columns, dtype=torch.int64)
    column, first, shift = torch.arange(stored.columns), 0, 0
    for width in (w for w in (8, 4, 2, 1) if stored.bits & w):
        place = column * width
        codes |= (stored.codes[:, first + place // 8].long() >> place % 8 & 2**width - 1) << shift
        first += -(-stored.columns * width // 8)
        shift += width
    return codes


def _bytes(rows: int, columns: int, top: int, g: torch.Generator) -> Tensor:
    return torch.randint(0, top, (rows, columns), dtype=torch.uint8, generator=g)


def copies_of(rows: int, columns: int, packed_bytes: int, set_bytes: int) -> int:
    """How many copies of a matrix are more than ``set_bytes``; ``InputError`` where that is out of proportion."""
    if set_bytes // packed_bytes > MOST_COPIES:
        raise InputError(f"a matrix of {rows} x {columns} is too small to be measured from memory; take a larger one")
    return 1 + set_bytes // packed_bytes
