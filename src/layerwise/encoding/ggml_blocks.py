"""The block types of ggml, as far as grids of ours fit them exactly: layouts, packing, unpacking.

Rows are cut into blocks of 32 or 256 columns, each with fp16 scales of its own. With ``L`` a whole-number level and
``s`` the fp16 step of the group a weight belongs to, so that the weight is ``s L``:

======  =====  =====  ==========================  ===================================================================
type    block  bytes  value                       holds ``s L`` exactly where, in every block (or part of one)
======  =====  =====  ==========================  ===================================================================
Q4_0    32     18     d (q - 8)                   L in -8..7, or in -7..8 with a negative d
Q5_0    32     22     d (q - 16)                  L in -16..15, or in -15..16
Q8_0    32     34     d q                         L in -128..127, or in -127..128
Q4_1    32     20     d q + m                     max L - min L <= 15 and ``s min L`` is an fp16 number
Q5_1    32     24     d q + m                     max L - min L <= 31 and ``s min L`` is an fp16 number
TQ1_0   256    54     d (q - 1), q 0..2           L in -1..1
TQ2_0   256    66     d (q - 1), q 0..3           L in -1..2, or in -2..1
Q2_K    256    84     d a q - e b, by 16 columns  max L - min L <= 3 and min L in -15..0
Q3_K    256    110    d a (q - 4), by 16          L in -4..3, or in -3..4
Q4_K    256    144    d a q - e b, by 32          max L - min L <= 15 and min L in -63..0
Q5_K    256    176    d a q - e b, by 32          max L - min L <= 31 and min L in -63..0
Q6_K    256    210    d a (q - 32), by 16         L in -32..31, or in -31..32
======  =====  =====  ==========================  ===================================================================

A type of 256 columns needs one step for the whole block. Every product and sum in the table is exact in float32 at
these sizes, so a block decodes to the very numbers that our form does (a zero may change its sign). The layouts are
those of llama.cpp's ``ggml-quants.c``, which the ``gguf`` package repeats; the tests compare with that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Levels = NDArray[np.int16]
Half = NDArray[np.float16]
TWO, FOUR = np.uint8(3), np.uint8(15)  # masks; typed, so that bytes stay bytes


@dataclass(frozen=True)
class BlockType:
    """A type of ggml: its number in files, columns and bytes of a block, and llama.cpp's name for a file of it."""

    name: str
    number: int
    columns: int
    nbytes: int
    file_type: int

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.nbytes / self.columns

    def row_bytes(self, columns: int) -> int:
        return columns // self.columns * self.nbytes


TYPES: dict[str, BlockType] = {
    t.name: t
    for t in (
        BlockType("TQ1_0", 34, 256, 54, 36),
        BlockType("TQ2_0", 35, 256, 66, 37),
        BlockType("Q2_K", 10, 256, 84, 10),
        BlockType("Q3_K", 11, 256, 110, 12),
        BlockType("Q4_0", 2, 32, 18, 2),
        BlockType("Q4_K", 12, 256, 144, 15),
        BlockType("Q4_1", 3, 32, 20, 3),
        BlockType("Q5_0", 6, 32, 22, 8),
        BlockType("Q5_K", 13, 256, 176, 17),
        BlockType("Q5_1", 7, 32, 24, 9),
        BlockType("Q6_K", 14, 256, 210, 18),
        BlockType("Q8_0", 8, 32, 34, 7),
        BlockType("F16", 1, 1, 2, 1),
        BlockType("BF16", 30, 1, 2, 32),
        BlockType("F32", 0, 1, 4, 0),
    )
}  # in the order of their size: the first that fits is the smallest
BY_NUMBER = {t.number: t for t in TYPES.values()}
INTEGER_TYPES = tuple(name for name, t in TYPES.items() if t.columns > 1)

# name -> (lowest level, highest level, columns that choose the sign of their scale)
SIGNED = {"Q4_0": (-8, 7, 32), "Q5_0": (-16, 15, 32), "Q8_0": (-128, 127, 32), "TQ1_0": (-1, 1, 256)} | {
    "TQ2_0": (-1, 2, 256), "Q3_K": (-4, 3, 16), "Q6_K": (-32, 31, 16),
}  # fmt: skip
# name -> (most that levels may span, lowest least level, columns that share a least level); None: any fp16 number
SHIFTED = {"Q4_1": (15, None, 32), "Q5_1": (31, None, 32), "Q2_K": (3, -15, 16)} | {
    "Q4_K": (15, -63, 32), "Q5_K": (31, -63, 32),
}  # fmt: skip


def fits(name: str, levels: Levels, steps: Half, near: bool = False) -> bool:
    """Whether the type holds these rows exactly: ``levels`` [rows, columns], ``steps`` [rows, columns / 32].

    near: the offsets ``m`` of Q4_1 and Q5_1 may be rounded to fp16.
    """
    kind = TYPES[name]
    if levels.shape[1] % kind.columns:
        return False
    if kind.columns == 256 and not bool((steps.reshape(-1, 8) == steps.reshape(-1, 8)[:, :1]).all()):
        return False
    if name in SIGNED:
        low, high, width = SIGNED[name]
        least, most = _ranges(levels, width)
        return bool((((least >= low) & (most <= high)) | ((least >= -high) & (most <= -low))).all())
    span, lowest, width = SHIFTED[name]
    least, most = _ranges(levels, width)
    if lowest is not None:
        least = np.minimum(least, 0)
        return bool((most - least <= span).all() and (least >= lowest).all())
    with np.errstate(over="ignore"):
        offset = least * steps.reshape(-1).astype(np.float32)
        stored = offset.astype(np.float16)
        held = np.isfinite(stored) if near else stored.astype(np.float32) == offset
        return bool((most - least <= span).all() and held.all())


def pack(name: str, levels: Levels, steps: Half) -> Bytes:
    """Rows for which ``fits`` holds, as the file has them: uint8 [rows, row bytes]."""
    kind = TYPES[name]
    blocks = levels.reshape(-1, kind.columns)
    step = steps.reshape(-1) if kind.columns == 32 else steps.reshape(-1, 8)[:, 0]
    packed = _signed(name, blocks, step) if name in SIGNED else _shifted(name, blocks, step)
    return packed.reshape(levels.shape[0], -1)


def _signed(name: str, blocks: Levels, step: Half) -> Bytes:
    """Types whose scale may be negative: code = sign * level + offset."""
    low, high, width = SIGNED[name]
    parts = blocks.reshape(len(blocks), -1, width)
    sign = np.where((parts.min(2) < low) | (parts.max(2) > high), -1, 1).astype(np.int16)
    codes = (parts * sign[:, :, None] - low).astype(np.uint8).reshape(blocks.shape)
    if name == "Q3_K":
        scales = (sign + 32).astype(np.uint8)
        low_bits, high_bits = scales & FOUR, scales >> np.uint8(4)
        packed = [low_bits[:, :8] | low_bits[:, 8:] << 4, _stacked(high_bits.reshape(-1, 4, 4), 2)]
        mask = np.packbits((codes >> 2).reshape(-1, 8, 32), axis=1, bitorder="little")[:, 0]
        return np.concatenate([mask, _two_bits(codes & TWO), *packed, _bytes(step)], 1)
    if name == "Q6_K":
        halves = (codes & FOUR).reshape(-1, 2, 2, 64)
        nibbles = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(-1, 128)
        return np.concatenate(
            [nibbles, _two_bits(codes >> np.uint8(4)), sign.astype(np.int8).view(np.uint8), _bytes(step)], 1
        )
    scale = _bytes(step * sign[:, 0].astype(np.float16))
    if name == "Q4_0":
        return np.concatenate([scale, _nibbles(codes)], 1)
    if name == "Q5_0":
        return np.concatenate([scale, np.packbits(codes >> 4, axis=1, bitorder="little"), _nibbles(codes & FOUR)], 1)
    if name == "Q8_0":
        return np.concatenate([scale, codes - 128], 1)  # wraps around to the signed byte
    if name == "TQ2_0":
        return np.concatenate([_two_bits(codes), scale], 1)
    return np.concatenate([_trits(codes), scale], 1)


def _shifted(name: str, blocks: Levels, step: Half) -> Bytes:
    """Types with a least level of their own: code = level - least level."""
    _, lowest, width = SHIFTED[name]
    parts = blocks.reshape(len(blocks), -1, width)
    least = parts.min(2)
    if lowest is None:
        return pack_codes(name, blocks - least, step, (least[:, 0] * step.astype(np.float32)).astype(np.float16))
    least = np.minimum(least, 0)
    codes = (parts - least[:, :, None]).astype(np.uint8).reshape(blocks.shape)
    below = (-least).astype(np.uint8)
    if name == "Q2_K":
        return np.concatenate([below << 4 | 1, _two_bits(codes), _bytes(step), _bytes(step)], 1)
    first, second = below[:, :4], below[:, 4:]  # six bits of each scale (all 1) and least level
    ones = np.ones_like(first)
    scales = np.concatenate([ones, first | second >> 4 << 6, ones | (second & FOUR) << 4], 1)
    pairs = (codes & FOUR).reshape(-1, 4, 2, 32)
    nibbles = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    mask = [np.packbits((codes >> 4).reshape(-1, 8, 32), axis=1, bitorder="little")[:, 0]] if name == "Q5_K" else []
    return np.concatenate([_bytes(step), _bytes(step), scales, *mask, nibbles], 1)


def pack_codes(name: str, codes: Levels, step: Half, offset: Half) -> Bytes:
    """Blocks of Q4_1 or Q5_1 from their codes [blocks, 32], d and m."""
    small = codes.astype(np.uint8)
    high = [np.packbits(small >> 4, axis=1, bitorder="little")] if name == "Q5_1" else []
    return np.concatenate([_bytes(step), _bytes(offset), *high, _nibbles(small & FOUR)], 1)


# ---------------------------------------------------------------- unpacking


def unpack(name: str, packed: Bytes) -> tuple[Levels, Half, Half | None]:
    """Blocks of 32 columns [blocks, bytes] -> (levels [blocks, 32], d [blocks], m [blocks] or None): ``d L + m``."""
    halves = packed[:, :2].copy().view(np.float16)[:, 0]
    if name == "Q8_0":
        return packed[:, 2:].copy().view(np.int8).astype(np.int16), halves, None
    shifted = name in SHIFTED
    at = 4 if shifted else 2
    offset = packed[:, 2:4].copy().view(np.float16)[:, 0] if shifted else None
    codes = np.concatenate([packed[:, -16:] & FOUR, packed[:, -16:] >> 4], 1).astype(np.int16)
    if name in ("Q5_0", "Q5_1"):
        codes |= np.unpackbits(packed[:, at : at + 4], axis=1, bitorder="little").astype(np.int16) << 4
    elif name not in ("Q4_0", "Q4_1"):
        raise ValueError(f"blocks of type {name} are written, not read")
    return codes if shifted else codes + np.int16(SIGNED[name][0]), halves, offset


# ---------------------------------------------------------------- private


def _ranges(levels: Levels, width: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    parts = levels.reshape(-1, width)
    return parts.min(1).astype(np.int32), parts.max(1).astype(np.int32)


def _bytes(halves: Half) -> Bytes:
    return halves.astype("<f2")[:, None].view(np.uint8)


def _nibbles(codes: Bytes) -> Bytes:
    """32 codes of 4 bits: the first half of the columns in the low nibbles."""
    return codes[:, :16] | codes[:, 16:] << np.uint8(4)


def _stacked(codes: Bytes, bits: int) -> Bytes:
    """``codes`` [blocks, n, m], of few bits each -> [blocks, m], the n-th shifted by ``bits`` n."""
    out = codes[:, 0].copy()
    for place in range(1, codes.shape[1]):
        out |= codes[:, place] << np.uint8(bits * place)
    return out


def _two_bits(codes: Bytes) -> Bytes:
    """256 codes of 2 bits: runs of 32 columns lie over one another, four to a byte."""
    parts = codes.reshape(-1, 4, 32)
    return _stacked(parts, 2).reshape(-1, 64).astype(np.uint8)


def _trits(codes: Bytes) -> Bytes:
    """256 codes 0..2, five to a byte (four in the last four bytes), as fractions whose ternary digits they are."""
    powers = np.array([81, 27, 9, 3, 1], np.uint16)[:, None]
    runs = (codes[:, :160].reshape(-1, 5, 32), codes[:, 160:240].reshape(-1, 5, 16), codes[:, 240:].reshape(-1, 4, 4))
    numbers = np.concatenate([(run * powers[: run.shape[1]]).sum(1) for run in runs], 1)
    return ((numbers.astype(np.uint32) * 256 + 242) // 243).astype(np.uint8)
