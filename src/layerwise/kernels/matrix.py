"""A matrix repacked for the compiled kernels, and its products ``y = x W^T``.

    W[r, k] = sum over planes of  s[r, g] (q[r, k] - z[r, g])        or  s[r, g] levels[q[r, k]],   g the group of k,
                                                                     or  s[r, g] values[state of the codes above]

Activations are rounded to whole numbers of a step in each block (a group, or a piece of at most 256 columns of one),
and every sum is exact in int32, so that the bits are the same on every path and for any number of threads:

    x_k ~ a (d0_k + 256 d1_k + 65536 d2_k),    y_r = sum over blocks of  a s_g sum_i 256^i (sum_k q d_ik - z sum_k d_ik)

Three digits, a step of the 8355711th part of the block's largest |x|, hold what float32 activations do, two (a 32639th)
what bfloat16 ones do, and one (a 127th) is what ``int8`` asks for. The three-digit product costs three dot-product
instructions for 64 products where float arithmetic takes four multiplications and the conversion of every code: on a
Zen 4 it reads packed 4-bit weights at twice the speed, and is exact to 2^-24 of the block's largest value.

The dot product of bfloat16 pairs, for which float32 activations could be cut in two or three parts, is no quicker: as
many a second, of 32 products. Two parts make 16 products an instruction against the 21 of three digits, their error is
2^-16, and the instruction's own roundings are not those of any other path. So whole numbers serve any number of tokens.
In large batches that limits products of float32 activations to seven tenths of the dense bfloat16 product's speed;
those of bfloat16 ones are level with it.

Codes that are places in a table meet floats. In large batches the dense product is faster for them, and so it is for
exact activations on processors without a dot-product instruction: panels of rows are decoded into the cache and handed
to torch.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layerwise.kernels.library import Stored, chosen_path, library

PANEL_TOKENS = 128  # from so many tokens on, panels
PANEL_TOKENS_16_BITS = 64
PANEL_BYTES = 4 << 20  # of a decoded panel: about what the caches of one core hold
TILE = 32  # rows
DOT_PATH = "avx512"  # with the dot-product instruction

SCALE_HALF, SCALE_BYTE = 0, 1
ZERO_NONE, ZERO_BYTE, ZERO_HALF = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Canonical:
    """A stored matrix in the order of its file.

    codes   uint8, the packed rows; bit planes of ``bits``, or with ``trits`` five codes to a byte; the ``planes`` of a
            row lie side by side.
    scale   [rows, planes * groups] fp16, or uint8 with a ``factor`` float32 [rows] beside it.
    zero    [rows, planes * groups] uint8 or fp16; None when every code counts from ``centre``.
    levels  float32 [16] when 4-bit codes are places in a table.
    values  int8 [256] for codes of a trellis (``encoding/trellis.py``), 1 to 5 bits: what every state stands for.
    """

    rows: int
    columns: int
    bits: int
    group: int
    codes: Tensor
    scale: Tensor
    factor: Tensor | None = None
    zero: Tensor | None = None
    levels: Tensor | None = None
    centre: int = 0
    planes: int = 1
    trits: bool = False
    values: Tensor | None = None

    def to(self, device: torch.device | str) -> Canonical:
        """The same matrix with its tensors on another device."""
        names = ("codes", "scale", "factor", "zero", "levels", "values")
        there = {name: tensor.to(device) for name in names if (tensor := getattr(self, name)) is not None}
        return replace(self, **there)


class PackedMatrix:
    """``[rows, columns]`` in tiles for the kernels. Holds memory of its own, about as much as the stored codes."""

    def __init__(self, stored: Canonical) -> None:
        loaded = library()
        if loaded is None:
            raise RuntimeError("there is no compiled library")
        self.rows, self.columns = stored.rows, stored.columns
        self.table = stored.levels is not None
        described, kept = describe(stored)
        handle = loaded.layerwise_repack(ctypes.byref(described), ctypes.sizeof(described), torch.get_num_threads())
        if not handle:
            raise ValueError(f"a matrix of {stored.rows} x {stored.columns} codes that do not fit its description")
        del kept  # the library has made its own of it
        self._library = loaded
        self._own(handle)

    def _own(self, handle: int) -> None:
        self._handle = handle
        self.nbytes = int(self._library.layerwise_bytes(handle))
        weakref.finalize(self, self._library.layerwise_release, handle)

    @property
    def handle(self) -> int:
        """The library's own name of the matrix, good for as long as this object is kept."""
        return self._handle

    def copy(self) -> PackedMatrix:
        """The same matrix in memory of its own."""
        handle = self._library.layerwise_copy(self._handle, torch.get_num_threads())
        if not handle:
            raise MemoryError("no memory for a copy of a packed matrix")
        twin = PackedMatrix.__new__(PackedMatrix)
        twin.rows, twin.columns, twin.table, twin._library = self.rows, self.columns, self.table, self._library
        twin._own(handle)
        return twin

    def multiply(self, x: Tensor, *, int8: bool = False, path: str | None = None, bias: Tensor | None = None) -> Tensor:
        """``x W^T + bias``: ``[..., columns]`` of any float type on the CPU -> ``[..., rows]`` of the same type.

        bias: float32 ``[rows]``, contiguous; it is added before the result is rounded to ``x``'s type. int8: round the
        activations to int8 first (not for tables of levels). path: take another than the chosen one.
        """
        if x.device.type != "cpu" or x.shape[-1:] != (self.columns,):
            raise ValueError(f"activations are [..., {self.columns}] on the CPU, not {list(x.shape)} on {x.device}")
        if int8 and self.table:
            raise ValueError("codes that are places in a table have no product with int8 activations")
        path = path or chosen_path()
        tokens = x.numel() // self.columns
        many = PANEL_TOKENS if x.dtype == torch.float32 else PANEL_TOKENS_16_BITS
        if tokens >= many and not int8 and (self.table or path != DOT_PATH):
            y = self._by_panels(x.detach().reshape(tokens, self.columns), path).view(*x.shape[:-1], self.rows)
            return y if bias is None else y.add_(bias)
        given = x.detach().reshape(tokens, self.columns).float()
        if given.stride(1) != 1 or (tokens > 1 and given.stride(0) < self.columns):
            given = given.contiguous()
        y = torch.empty(tokens, self.rows)
        status = self._library.layerwise_multiply(
            self._handle, _name(path), given.data_ptr(), tokens, given.stride(0), y.data_ptr(), self.rows,
            None if bias is None else bias.data_ptr(), 1 if int8 else 2 if x.dtype == torch.bfloat16 else 3,
            torch.get_num_threads(),
        )  # fmt: skip
        _succeeded(status, path)
        return y.to(x.dtype).view(*x.shape[:-1], self.rows)

    def decode(self, path: str | None = None) -> Tensor:
        """The dense matrix, float32 ``[rows, columns]``: bit for bit what the stored form decodes to."""
        return self._panel(0, -(-self.rows // TILE), path or chosen_path())[:, : self.rows].T.contiguous()

    def read(self, path: str | None = None) -> None:
        """Only read what a product reads, with as many threads: the limit that a product is held against."""
        self._library.layerwise_read(self._handle, _name(path or chosen_path()), torch.get_num_threads())

    def _panel(self, first: int, last: int, path: str | None, into: Tensor | None = None) -> Tensor:
        """Tiles ``first .. last - 1``, transposed: float32 [columns, 32 * tiles]."""
        width = (last - first) * TILE
        panel = torch.empty(self.columns, width) if into is None else into[: self.columns * width].view(-1, width)
        status = self._library.layerwise_decode(
            self._handle, _name(path), first, last, panel.data_ptr(), width, torch.get_num_threads()
        )
        _succeeded(status, path)
        return panel

    def _by_panels(self, x: Tensor, path: str | None) -> Tensor:
        tiles = -(-self.rows // TILE)
        step = min(tiles, max(1, PANEL_BYTES // (4 * TILE * self.columns)))
        memory = torch.empty(self.columns * step * TILE)
        y = torch.empty(len(x), self.rows, dtype=x.dtype)
        for first in range(0, tiles, step):
            last = min(first + step, tiles)
            own = slice(first * TILE, min(last * TILE, self.rows))
            panel = self._panel(first, last, path, memory)[:, : own.stop - own.start].to(x.dtype)
            if first == 0 and last == tiles:
                return torch.mm(x, panel)
            y[:, own] = torch.mm(x, panel)
        return y


class PackedTable:
    """Rows looked up from a stored matrix where it lies: nothing is repacked, nothing held twice."""

    def __init__(self, stored: Canonical) -> None:
        loaded = library()
        if loaded is None:
            raise RuntimeError("there is no compiled library")
        self._library = loaded
        self.rows, self.columns = stored.rows, stored.columns
        self._described, self._kept = describe(stored)

    def take(self, index: Tensor) -> Tensor:
        """Rows ``index`` (1-D int64 on the CPU), float32 ``[.., columns]``: bit for bit what the form decodes to."""
        index = index.contiguous()
        found = torch.empty(index.numel(), self.columns)
        status = self._library.layerwise_take(
            ctypes.byref(self._described), ctypes.sizeof(self._described), index.data_ptr(), index.numel(),
            found.data_ptr(),
        )  # fmt: skip
        if status == 5:
            raise IndexError(f"row numbers are 0 to {self.rows - 1}")
        if status:
            raise ValueError(f"a table of {self.rows} x {self.columns} codes that do not fit its description")
        return found


def describe(stored: Canonical) -> tuple[Stored, list[Tensor | None]]:
    """``stored`` as the library takes it, and the tensors that it points into."""
    kept = [None if t is None else t.detach().cpu().contiguous() for t in _tensors(stored)]
    codes, scale, zero, factor, levels, values = kept
    assert codes is not None and scale is not None
    _check(stored, codes, scale, zero, factor, levels, values)
    described = Stored(
        stored.rows, stored.columns, stored.bits, stored.planes, stored.group, int(stored.trits),
        SCALE_BYTE if scale.dtype == torch.uint8 else SCALE_HALF,
        ZERO_NONE if zero is None else ZERO_BYTE if zero.dtype == torch.uint8 else ZERO_HALF,
        stored.centre, *_bytes(codes), *_bytes(scale), *_bytes(zero), _bytes(factor)[0], _bytes(levels)[0],
        _bytes(values)[0],
    )  # fmt: skip
    return described, kept


def _tensors(stored: Canonical) -> tuple[Tensor | None, ...]:
    factor = None if stored.factor is None else stored.factor.float()
    return stored.codes, stored.scale, stored.zero, factor, stored.levels, stored.values


def _check(
    stored: Canonical,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    factor: Tensor | None,
    levels: Tensor | None,
    values: Tensor | None,
) -> None:
    """Types, and the sizes that the library cannot see; it checks all others."""
    sound = codes.dtype == torch.uint8 and scale.dtype in (torch.uint8, torch.float16)
    sound = sound and (zero is None or zero.dtype in (torch.uint8, torch.float16))
    sound = sound and (factor is None or factor.numel() == stored.rows)
    sound = sound and (levels is None or (levels.dtype == torch.float32 and levels.numel() == 16))
    sound = sound and (values is None or (values.dtype == torch.int8 and values.numel() == 256))
    if not sound:
        raise ValueError(
            "codes are uint8, scales and zeros uint8 or fp16, factors one a row, levels 16 float32, values 256 int8"
        )


def _bytes(tensor: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if tensor is None else (tensor.data_ptr(), tensor.numel() * tensor.element_size())


def _name(path: str | None) -> bytes:
    if path is None:
        raise ValueError("the compiled kernels are turned off")
    return path.encode()


def _succeeded(status: int, path: str | None) -> None:
    if status == 3:
        raise MemoryError("no memory for the activations of a packed product")
    if status:
        raise ValueError(f"the compiled kernels have no path {path!r} here, or no such product")
