"""The keys and values of every block, in memory that is set aside once.

    block 0   keys   [rows, heads, capacity, width]      values   [rows, heads, capacity, width]
    …                      ^ positions are written where the caller says; nothing is ever moved

A cache has no length of its own: each pass says at which position it starts, writes there, and sees what lies at and
before its own positions. Taking tokens back therefore costs nothing and leaves nothing behind: the next pass starts
earlier and writes over them.

Stored forms, chosen for all blocks (``--kv-cache``):

    16     as the network computes them
    int8   code * s,            s = max|x| / 127 over a token's group of channels, fp16;          1.06 bytes a number
    int4   code * s + low,      s = (max - min) / 15, low = min, both fp16, two codes a byte;     0.63 bytes a number

Groups are at most 32 channels (int4) or the head's width up to 64 (int8) of one token and one head. A token's codes
depend on that token alone, so that what is written again after a roll-back is what plain decoding would have written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from layerwise.errors import InputError

KINDS = ("16", "int8", "int4")
GROUPS = {"int8": 64, "int4": 32}  # channels that share a step, at most


class Store(ABC):
    """Room for the keys, or the values, of one block: ``[rows, heads, capacity, width]``."""

    @abstractmethod
    def write(self, new: Tensor, starts: Sequence[int]) -> None:
        """Put ``new`` [rows, heads, count, width] at each row's own start."""

    @abstractmethod
    def read(self, end: int) -> Tensor:
        """Positions ``0 … end - 1`` of every row, in the network's type."""

    @abstractmethod
    def parts(self) -> tuple[Tensor, ...]:
        """What is kept, each ``[rows, heads, capacity, …]``."""

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts())


class Plain(Store):
    """As computed."""

    def __init__(self, like: Tensor, capacity: int) -> None:
        rows, heads, _, width = like.shape
        self.data = like.new_zeros(rows, heads, capacity, width)

    def write(self, new: Tensor, starts: Sequence[int]) -> None:
        place(self.data, new, starts)

    def read(self, end: int) -> Tensor:
        return self.data[:, :, :end]

    def parts(self) -> tuple[Tensor, ...]:
        return (self.data,)


class Int8(Store):
    """Symmetric 8-bit codes."""

    def __init__(self, like: Tensor, capacity: int) -> None:
        rows, heads, _, width = like.shape
        self.dtype, self.group = like.dtype, group_of(width, "int8")
        shape = (rows, heads, capacity, width // self.group)
        self.codes = torch.zeros(*shape, self.group, dtype=torch.int8, device=like.device)
        self.step = torch.zeros(*shape, 1, dtype=torch.float16, device=like.device)

    def write(self, new: Tensor, starts: Sequence[int]) -> None:
        grouped = new.unflatten(-1, (-1, self.group)).float()
        step = as_half(grouped.abs().amax(-1, keepdim=True) / 127)
        codes = (grouped / step.float()).round_().clamp_(-127, 127).to(torch.int8)
        place(self.codes, codes, starts)
        place(self.step, step, starts)

    def read(self, end: int) -> Tensor:
        return (self.codes[:, :, :end].to(self.dtype) * self.step[:, :, :end].to(self.dtype)).flatten(-2)

    def parts(self) -> tuple[Tensor, ...]:
        return self.codes, self.step


class Int4(Store):
    """Asymmetric 4-bit codes, two to a byte."""

    def __init__(self, like: Tensor, capacity: int) -> None:
        rows, heads, _, width = like.shape
        self.dtype, self.group = like.dtype, group_of(width, "int4")
        shape = (rows, heads, capacity, width // self.group)
        self.codes = torch.zeros(*shape, self.group // 2, dtype=torch.uint8, device=like.device)
        self.step = torch.zeros(*shape, 1, dtype=torch.float16, device=like.device)
        self.low = torch.zeros_like(self.step)

    def write(self, new: Tensor, starts: Sequence[int]) -> None:
        grouped = new.unflatten(-1, (-1, self.group)).float()
        low = grouped.amin(-1, keepdim=True).clamp(-65504, 65504).half()
        step = as_half((grouped.amax(-1, keepdim=True) - low.float()) / 15)
        codes = ((grouped - low.float()) / step.float()).round_().clamp_(0, 15).to(torch.uint8)
        place(self.codes, codes[..., ::2] | codes[..., 1::2] << 4, starts)
        place(self.step, step, starts)
        place(self.low, low, starts)

    def read(self, end: int) -> Tensor:
        packed = self.codes[:, :, :end]
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).to(self.dtype)
        return (codes * self.step[:, :, :end].to(self.dtype) + self.low[:, :, :end].to(self.dtype)).flatten(-2)

    def parts(self) -> tuple[Tensor, ...]:
        return self.codes, self.step, self.low


STORES: dict[str, type[Plain] | type[Int8] | type[Int4]] = {"16": Plain, "int8": Int8, "int4": Int4}


class Cache:
    """Keys and values of all blocks. Blocks call ``update`` as they would call a cache of transformers'.

    starts: where the pass that is running begins, per row; set by the session before blocks run.
    """

    is_compileable = False

    def __init__(self, blocks: int, capacity: int, kind: str = "16") -> None:
        check_kind(kind)
        self.capacity, self.kind = capacity, kind
        self.stores: list[tuple[Store, Store] | None] = [None] * blocks  # made at a block's first pass
        self.starts: Sequence[int] = ()

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write a pass's keys and values [rows, heads, count, width], and return all up to its last position."""
        found = self.stores[layer_idx]
        if found is None:
            store = STORES[self.kind]
            found = self.stores[layer_idx] = store(keys, self.capacity), store(values, self.capacity)
        end = max(self.starts) + keys.shape[2]
        if end > self.capacity:
            raise ValueError(f"a cache of {self.capacity} positions cannot take position {end - 1}")
        for one, new in zip(found, (keys, values), strict=True):
            one.write(new, self.starts)
        return found[0].read(end), found[1].read(end)

    def plain(self, block: int, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values of a block where they lie, made now ``like`` [rows, heads, any, width]; None if in codes."""
        if self.kind != "16":
            return None
        found = self.stores[block]
        if found is None:
            found = self.stores[block] = Plain(like, self.capacity), Plain(like, self.capacity)
        return found[0].parts()[0], found[1].parts()[0]

    def read(self, block: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a block, ``[rows, heads, end, width]`` each; ``ValueError`` before its first pass."""
        found = self.stores[block]
        if found is None:
            raise ValueError(f"block {block} has not run yet")
        return found[0].read(end), found[1].read(end)

    def gather(self, start: int, places: Sequence[int]) -> None:
        """Move what lies at ``places`` (ascending, none before ``start``) to ``start`` and on, in all rows."""
        if list(places) == list(range(start, start + len(places))):
            return
        for store in (store for found in self.stores if found is not None for store in found):
            for part in store.parts():
                part[:, :, start : start + len(places)] = part[:, :, list(places)]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for found in self.stores if found is not None for part in found)


def place(into: Tensor, new: Tensor, starts: Sequence[int]) -> None:
    """``into[row, :, start_row : start_row + count] = new[row]`` for ``[rows, heads, positions, …]``."""
    count = new.shape[2]
    if len(set(starts)) == 1:
        into[:, :, starts[0] : starts[0] + count] = new
        return
    for row, start in enumerate(starts):
        into[row, :, start : start + count] = new[row]


def group_of(width: int, kind: str) -> int:
    """Channels that share a step: the largest divisor of a head's width that is allowed; even, to pack codes."""
    found = max(g for g in range(1, GROUPS[kind] + 1) if width % g == 0)
    if kind == "int4" and found % 2:
        raise InputError(f"heads of width {width} cannot keep their cache in int4; take int8 or 16")
    return found


def as_half(step: Tensor) -> Tensor:
    """A step in fp16 that is neither zero nor infinite."""
    return step.clamp(2.0**-24, 65504.0).half()


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise InputError(f"the cache is kept as one of {', '.join(KINDS)}, not {kind!r}")
