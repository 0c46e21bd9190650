"""Form ``superblock``: rows of ggml's blocks of 256 columns, byte for byte as a GGUF file has them.

    W[r, k] = d s_g (q_k - z) - e m_g,    g the 16 or 32 columns (TQ: all 256) of a block that k lies in

=================  =============================  =============================================
stored tensor      type and shape                 holds
=================  =============================  =============================================
``""``             uint8 [rows * row bytes]       the blocks of each row, one after another
=================  =============================  =============================================

``d`` and ``e`` are fp16 numbers of a block, ``s`` and ``m`` whole numbers of 4 to 8 bits of a group: steps of two
factors, which no grid of ours has. ``TYPES`` in ``ggml_blocks`` has the sizes; the layouts are those of llama.cpp's
``ggml-quants.c``. In float32 ``d s q`` has at most 24 significant bits, so that one subtraction rounds and every reader
that adds in this order has the same numbers; ``decode`` is bit for bit what llama.cpp and the ``gguf`` package decode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerwise.encoding.bitplanes import LAYOUT_VERSION
from layerwise.encoding.encoded import Layout, PackedRows
from layerwise.encoding.ggml_blocks import TYPES
from layerwise.encoding.integer import check_tensors, check_version, stored_shape
from layerwise.errors import InputError

COLUMNS = 256
# name -> where a block has its one or two fp16 numbers
HALVES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Superblock(PackedRows):
    """``packed`` uint8 [rows, row bytes], blocks of the ``kind`` of ggml that ``HALVES`` names."""

    form: ClassVar[str] = "superblock"
    packed: Tensor
    columns: int
    kind: str

    @staticmethod
    def of(kind: str, packed: Tensor, columns: int) -> Superblock:
        """Raises ``InputError`` for fp16 numbers that are not finite."""
        made = Superblock(packed, columns, kind)
        if not all(bool(torch.isfinite(_half(made._blocks(packed), at)).all()) for at in HALVES[kind]):
            raise InputError(f"a block of type {kind} has a scale that is no finite number")
        return made

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.packed.shape[0], self.columns

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.packed.reshape(-1)}

    def spec(self) -> dict[str, Any]:
        return {"form": self.form, "layout": LAYOUT_VERSION, "shape": list(self.shape), "type": self.kind}

    @classmethod
    def restore(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Superblock:
        rows, columns = stored_shape(spec)
        check_version(spec, "blocks")
        kind = spec.get("type")
        if not isinstance(kind, str) or kind not in HALVES:
            raise InputError(f"a superblock form is of a type {', '.join(HALVES)}, not {kind!r}")
        if columns % COLUMNS:
            raise InputError(f"a superblock form has a multiple of {COLUMNS} columns, not {columns}")
        check_tensors(superblock_layout(kind, rows, columns), tensors)
        return cls.of(kind, tensors[""].view(rows, -1), columns)

    def _blocks(self, packed: Tensor) -> Tensor:
        return packed.reshape(-1, TYPES[self.kind].nbytes)

    def _decode(self, rows: slice | Tensor) -> Tensor:
        packed = self.packed[rows]
        codes, steps, floors = parts_of(self.kind, self._blocks(packed))
        values = codes.float().view(len(codes), steps.shape[1], -1).mul_(steps[:, :, None])
        if floors is not None:
            values.sub_(floors[:, :, None])
        return values.view(len(packed), self.columns)


def superblock_layout(kind: str, rows: int, columns: int) -> Layout:
    """Suffix -> (dtype, shape) of every tensor of a superblock form of this shape."""
    return {"": (torch.uint8, (rows * TYPES[kind].row_bytes(columns),))}


def parts_of(kind: str, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Blocks [n, bytes] -> (levels int16 [n, 256], steps float32 [n, groups], what is subtracted [n, groups] or None).

    The levels count from zero: ``q - z``.
    """
    first = _half(blocks, HALVES[kind][0])[:, None]
    if kind == "Q2_K":
        scales, second = blocks[:, :16], _half(blocks, 82)[:, None]
        return _pairs(blocks[:, 16:80]).short(), first * (scales & 15), second * (scales >> 4)
    if kind == "Q3_K":
        codes = _pairs(blocks[:, 32:96]) | _bits(blocks[:, :32]) << 2
        low, high = blocks[:, 96:104], blocks[:, 104:108]
        scales = torch.cat([low & 15, low >> 4], 1) | _shifted(high[:, None], (0, 2, 4, 6), 3).flatten(1) << 4
        return codes.short() - 4, first * (scales.float() - 32), None
    if kind in ("Q4_K", "Q5_K"):
        second, at = _half(blocks, 2)[:, None], 16 if kind == "Q4_K" else 48
        a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
        scales = torch.cat([a & 63, c & 15 | a >> 6 << 4], 1)
        floors = torch.cat([b & 63, c >> 4 | b >> 6 << 4], 1)
        codes = _nibbles(blocks[:, at:], 32)
        codes = codes | _bits(blocks[:, 16:48]) << 4 if kind == "Q5_K" else codes
        return codes.short(), first * scales, second * floors
    if kind == "Q6_K":
        codes = _nibbles(blocks[:, :128], 64) | _pairs(blocks[:, 128:192]) << 4
        return codes.short() - 32, first * blocks[:, 192:208].contiguous().view(torch.int8), None
    if kind == "TQ2_0":
        return _pairs(blocks[:, :64]).short() - 1, first, None
    return _trits(blocks).short() - 1, first, None


# ---------------------------------------------------------------- private


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at a byte of each block: float32 [n]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16)[:, 0].float()


def _shifted(held: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Bytes [n, m, w] -> [n, m, shifts, w], each shifted and masked."""
    by = torch.tensor(shifts, dtype=torch.uint8, device=held.device)
    return held[:, :, None] >> by[:, None] & mask


def _pairs(held: Tensor) -> Tensor:
    """64 bytes of four codes of 2 bits: runs of 32 columns lie over one another."""
    return _shifted(held.reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, COLUMNS)


def _bits(held: Tensor) -> Tensor:
    """32 bytes of eight bits: runs of 32 columns lie over one another."""
    return _shifted(held.reshape(-1, 1, 32), tuple(range(8)), 1).reshape(-1, COLUMNS)


def _nibbles(held: Tensor, run: int) -> Tensor:
    """128 bytes of two codes of 4 bits: two runs of ``run`` columns lie over one another."""
    return _shifted(held.reshape(len(held), -1, run), (0, 4), 15).reshape(-1, COLUMNS)


def _trits(blocks: Tensor) -> Tensor:
    """52 bytes of five trits, four in the last four bytes, as fractions whose ternary digits they are."""
    powers = torch.tensor([1, 3, 9, 27, 81], device=blocks.device)[:, None]
    runs = [
        3 * (blocks[:, None, first:last].int() * powers[:count] % 256) >> 8
        for first, last, count in ((0, 32, 5), (32, 48, 5), (48, 52, 4))
    ]
    return torch.cat([run.flatten(1) for run in runs], 1)
