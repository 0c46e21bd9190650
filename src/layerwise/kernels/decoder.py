"""Blocks of a decoder by one call of the compiled library, their matrices packed, over a cache of keys and values.

    h = x + out(heads(norm(x))),   y = h + down(silu(gate(norm(h))) up(norm(h))),   scores = head(norm(y))

Query and key are normed head by head in some networks, and turned by the angles of their position (rotary tables); each
key and value serves ``heads / groups`` queries, and a position sees those up to its own, as far back as the block's
window. Products round inputs as ``PackedMatrix.multiply`` does and give its bits; what is multiplied with the same
input shares one rounding. Norms, gates, angles and the softmax are computed in float32, to about 1e-6, the same bits on
every path (but for places in a table, whose products are sums of floats), for any number of threads, and for a token by
itself as in a row of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.kernels.encoder import Norm, address, plain
from layerwise.kernels.library import Decoder, DecoderBlock, required
from layerwise.kernels.matrix import PackedMatrix

LINEARS = ("query", "key", "value", "out", "gate", "up", "down")
STEP, LONGEST_HEAD = 16, 256  # of widths: what they are multiples of; features of a head at most


@dataclass(frozen=True, eq=False)
class Block:
    """Matrices and biases (float32 [rows] or None) in the order of ``LINEARS``, and the norms in front of both halves.

    window: positions that are seen, the own one the last; None for all.
    head_norms: of the queries and of the keys of each head, without a mean taken off or a shift; None for none.
    """

    matrices: tuple[PackedMatrix, ...]
    biases: tuple[Tensor | None, ...]
    norms: tuple[Norm, Norm]
    window: int | None = None
    head_norms: tuple[Norm, Norm] | None = None


@dataclass(frozen=True, eq=False)
class Head:
    """The last norm, and what reads scores off it."""

    norm: Norm
    matrix: PackedMatrix
    bias: Tensor | None = None


@dataclass(frozen=True)
class Shape:
    """What all blocks have in common. centred: norms take the mean off first (LayerNorm)."""

    width: int
    heads: int
    groups: int
    dim: int
    scale: float
    centred: bool = False

    def check(self) -> None:
        """``ValueError`` where the library has no attention of that shape."""
        if self.width % STEP or self.dim % STEP or not 0 < self.dim <= LONGEST_HEAD:
            raise ValueError(f"width and heads are multiples of {STEP} features, heads at most {LONGEST_HEAD}")
        if self.groups < 1 or self.heads % self.groups:
            raise ValueError(f"{self.groups} heads of keys do not divide {self.heads} heads of queries")


class PackedDecoder:
    """Blocks that the library runs, described once. Raises ``ValueError`` where shapes do not follow one another."""

    def __init__(self, shape: Shape, blocks: Sequence[Block], head: Head | None = None) -> None:
        shape.check()
        self.shape, self.blocks, self.head = shape, tuple(blocks), head
        asking, offering = shape.heads * shape.dim, shape.groups * shape.dim
        for block in self.blocks:
            inner, width = block.matrices[4].rows, shape.width
            wanted = [(asking, width), (offering, width), (offering, width), (width, asking)]
            wanted += [(inner, width), (inner, width), (width, inner)]
            if [(m.rows, m.columns) for m in block.matrices] != wanted:
                raise ValueError(f"the matrices of a block are not {wanted}")
        if head is not None and head.matrix.columns != shape.width:
            raise ValueError(f"the head takes {head.matrix.columns} features, not {shape.width}")
        self._vectors = self._checked_vectors()
        self._places = [t.data_ptr() for t in self._vectors]
        self._described = (DecoderBlock * len(self.blocks))(*map(_described, self.blocks))
        self._common = Decoder(
            width=shape.width, heads=shape.heads, groups=shape.groups, dim=shape.dim, scale=shape.scale,
            centred=shape.centred,
        )  # fmt: skip

    def _checked_vectors(self) -> list[Tensor]:
        given: list[tuple[Tensor | None, int]] = []
        for block in self.blocks:
            given += [(b, m.rows) for b, m in zip(block.biases, block.matrices, strict=True)]
            given += [(t, self.shape.width) for norm in block.norms for t in (norm.weight, norm.shift)]
            given += [(norm.weight, self.shape.dim) for norm in block.head_norms or ()]
            if any(norm.shift is not None for norm in block.head_norms or ()):
                raise ValueError("norms of heads have no shift")
        if self.head is not None:
            given += [(t, self.shape.width) for t in (self.head.norm.weight, self.head.norm.shift)]
            given += [(self.head.bias, self.head.matrix.rows)]
        if any(t is not None and not plain(t, size) for t, size in given):
            raise ValueError("biases and norms are float32 vectors on the CPU, as long as what they are added to")
        return [t for t, _ in given if t is not None]

    def in_place(self) -> bool:
        """Whether biases and norms lie where they lay, as those do not whose type or device was changed."""
        return [t.data_ptr() for t in self._vectors] == self._places

    def wants_gradient(self) -> bool:
        return any(tensor.requires_grad for tensor in self._vectors)

    def over(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        turns: tuple[Tensor, Tensor] | None = None,
        origin: int = 0,
    ) -> Decoding:
        """The blocks over caches ``[rows, groups, capacity, dim]`` float32 of each, which are written to.

        turns: cosines and sines ``[positions, features that are turned]`` float32, of positions from ``origin`` on.
        """
        return Decoding(self, keys, values, turns, origin)

    def scores(self, x: Tensor, *, int8: bool, path: str | None = None) -> Tensor:
        """Scores ``[..., words]`` of hidden states ``[..., width]`` behind any block."""
        if self.head is None:
            raise ValueError("this decoder has no head")
        flat = x.reshape(1, -1, self.shape.width).contiguous()
        asked = Decoder.from_buffer_copy(self._common)
        scores = self._with_head(asked, flat)
        _run(asked, flat, None, int8, path)
        return scores.view(*x.shape[:-1], self.head.matrix.rows)

    def _with_head(self, asked: Decoder, x: Tensor) -> Tensor:
        head = self.head
        if head is None:
            raise ValueError("this decoder has no head")
        scores = torch.empty(*x.shape[:-1], head.matrix.rows)
        asked.head, asked.head_bias, asked.scores = head.matrix.handle, address(head.bias), scores.data_ptr()
        asked.weight, asked.shift = head.norm.weight.data_ptr(), address(head.norm.shift)
        asked.epsilon = head.norm.epsilon
        return scores


class Decoding:
    """A decoder over one cache. Raises ``ValueError`` where the two do not fit."""

    def __init__(
        self,
        decoder: PackedDecoder,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        turns: tuple[Tensor, Tensor] | None,
        origin: int = 0,
    ) -> None:
        self.decoder, self._kept = decoder, (list(keys), list(values), turns)
        shape, caches = decoder.shape, [*keys, *values]
        self.rows, _, self.capacity, _ = caches[0].shape if caches else (1, 0, 0, 0)
        wanted = (self.rows, shape.groups, self.capacity, shape.dim)
        if len(keys) != len(decoder.blocks) or len(values) != len(keys) or any(not _cache(t, wanted) for t in caches):
            raise ValueError(f"caches are float32 [rows, {shape.groups}, capacity, {shape.dim}], two for each block")
        self._blocks = type(decoder._described).from_buffer_copy(decoder._described)
        for own, key, value in zip(self._blocks, keys, values, strict=True):
            own.keys, own.values = key.data_ptr(), value.data_ptr()
        self._first = ctypes.addressof(self._blocks)
        self._common = Decoder.from_buffer_copy(decoder._common)
        self._common.capacity = self.capacity
        if turns is not None:
            if turns[0].shape != turns[1].shape or any(not _table(t) or t.shape[1] > shape.dim for t in turns):
                raise ValueError(f"cosines and sines are float32 [positions, an even number up to {shape.dim}]")
            self._common.cosine, self._common.sine = (t.data_ptr() for t in turns)
            self._common.turns, self._common.turned = turns[0].shape
            self._common.origin = origin

    def run(self, x: Tensor, blocks: range, starts: Sequence[int], *, int8: bool, path: str | None = None) -> Tensor:
        """Hidden states ``[rows, count, width]`` behind a run of blocks; positions begin at each row's start."""
        asked, x = self._asked(x, blocks, starts)
        y = torch.empty_like(x)
        _run(asked, x, y, int8, path)
        return y

    def scores(self, x: Tensor, starts: Sequence[int], *, int8: bool, path: str | None = None) -> Tensor:
        """Scores ``[rows, count, words]`` behind all blocks."""
        asked, x = self._asked(x, range(len(self.decoder.blocks)), starts)
        found = self.decoder._with_head(asked, x)
        _run(asked, x, None, int8, path)
        return found

    def _asked(self, x: Tensor, blocks: range, starts: Sequence[int]) -> tuple[Decoder, Tensor]:
        if not takes(x, self.decoder.shape.width) or len(x) != self.rows or len(starts) != self.rows:
            raise ValueError(f"hidden states are float32 [{self.rows}, tokens, {self.decoder.shape.width}] on the CPU")
        if not len(blocks) or blocks.step != 1 or blocks.start < 0 or blocks.stop > len(self.decoder.blocks):
            raise ValueError(f"there are blocks 0 to {len(self.decoder.blocks) - 1}, not {blocks}")
        x = x.detach().contiguous()
        asked = Decoder.from_buffer_copy(self._common)
        asked._starts = (ctypes.c_int64 * self.rows)(*starts)  # kept with what points to it
        asked.starts = ctypes.addressof(asked._starts)
        asked.block = self._first + blocks.start * ctypes.sizeof(DecoderBlock)
        asked.rows, asked.count, asked.blocks = self.rows, x.shape[1], len(blocks)
        return asked, x


def takes(x: Tensor, width: int) -> bool:
    """Whether ``run`` is for these: plain float32 values ``[rows, tokens, width]`` on the CPU, no gradient."""
    sound = type(x) is Tensor and x.dim() == 3 and x.dtype == torch.float32 and x.device.type == "cpu"
    return sound and x.shape[2] == width and x.numel() > 0 and not (x.requires_grad and torch.is_grad_enabled())


def _run(asked: Decoder, x: Tensor, y: Tensor | None, int8: bool, path: str | None) -> None:
    loaded, path = required(path)
    if not asked.blocks:
        asked.rows, asked.count = x.shape[0], x.shape[1]
    asked.x, asked.y, asked.digits, asked.path = x.data_ptr(), address(y), 1 if int8 else 3, path.encode()
    status = loaded.layerwise_continue(ctypes.byref(asked), ctypes.sizeof(asked), torch.get_num_threads())
    if status == 3:
        raise MemoryError("no memory for the blocks of a decoder")
    if status == 1:
        raise ValueError(f"the compiled kernels have no path {path!r} here")
    if status:
        raise ValueError("the new positions do not fit into the cache or the tables of angles")


def _described(block: Block) -> DecoderBlock:
    first, second = block.norms
    heads = block.head_norms or ()
    return DecoderBlock(
        head_weight=tuple(norm.weight.data_ptr() for norm in heads), head_epsilon=tuple(n.epsilon for n in heads),
        matrix=tuple(m.handle for m in block.matrices), bias=tuple(address(b) for b in block.biases),
        weight=(first.weight.data_ptr(), second.weight.data_ptr()), shift=(address(first.shift), address(second.shift)),
        epsilon=(first.epsilon, second.epsilon), window=block.window or 0,
    )  # fmt: skip


def _cache(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    sound = tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()
    return sound and tuple(tensor.shape) == shape


def _table(tensor: Tensor) -> bool:
    sound = tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()
    return sound and tensor.dim() == 2 and tensor.shape[1] % 2 == 0
