"""Codes of 1 to 8 bits, packed into bytes row by row. Layout version 1.

A code is cut into planes whose widths are the powers of two in its bit count, widest first, the first plane holding
the lowest bits: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1. A plane never splits a code's bits over two bytes.

    row of 5 columns at 3 bits      plane of 2 bits: 2 bytes        plane of 1 bit: 1 byte
    codes c0 c1 c2 c3 c4            [c3 c2 c1 c0] [ 0  0  0 c4]     [0 0 0 c4 c3 c2 c1 c0]
                                     high .. low bits 0-1 of each     bit 2 of each

Inside a byte the first column sits in the lowest bits. Each plane of each row ends on a whole byte, the unused high
bits being zero, and the planes of one row lie side by side, so that a row is one run of ``row_bytes`` bytes: any range
or gathering of rows is a slice or an index, and a matrix can be cut between rows without repacking.
"""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUT_VERSION = 1
PACKED_AT_ONCE = 1 << 21  # codes; their planes are as large again


def plane_widths(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a ``bits``-bit code (1..8), in stored order: ``7 -> (4, 2, 1)``."""
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of one packed row."""
    return sum(-(-columns * width // 8) for width in plane_widths(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """``codes`` [rows, columns] uint8, each below ``2**bits``  ->  [rows, row_bytes] uint8."""
    rows, columns = codes.shape
    packed = torch.zeros(rows, row_bytes(columns, bits), dtype=torch.uint8, device=codes.device)
    step = max(1, PACKED_AT_ONCE // max(1, columns))
    for start in range(0, rows, step):
        _pack(codes[start : start + step], bits, packed[start : start + step])
    return packed


def _pack(codes: Tensor, bits: int, packed: Tensor) -> None:
    """Add the bits of ``codes`` to rows of zeros."""
    columns = codes.shape[1]
    first_byte = shift = 0
    for width in plane_widths(bits):
        per_byte = 8 // width
        size = -(-columns // per_byte)
        plane = (codes >> shift) & (2**width - 1)
        target = packed[:, first_byte : first_byte + size]
        for place in range(min(per_byte, columns)):
            part = plane[:, place::per_byte]
            target[:, : part.shape[1]] |= part << (place * width)
        first_byte += size
        shift += width


def unpack(packed: Tensor, columns: int, bits: int) -> Tensor:
    """The inverse of ``pack``: [rows, row_bytes] uint8  ->  codes [rows, columns] uint8."""
    rows = packed.shape[0]
    codes = torch.zeros(rows, columns, dtype=torch.uint8, device=packed.device)
    first_byte = shift = 0
    for width in plane_widths(bits):
        per_byte = 8 // width
        size = -(-columns // per_byte)
        plane = packed[:, first_byte : first_byte + size]
        for place in range(min(per_byte, columns)):
            part = codes[:, place::per_byte]
            part |= ((plane[:, : part.shape[1]] >> (place * width)) & (2**width - 1)) << shift
        first_byte += size
        shift += width
    return codes


def unpack_columns(packed: Tensor, index: Tensor, bits: int, columns: int) -> Tensor:
    """The codes of some of the ``columns``, in the order of ``index`` int64: uint8 [rows, len(index)]."""
    codes = torch.zeros(packed.shape[0], len(index), dtype=torch.uint8, device=packed.device)
    first_byte = shift = 0
    for width in plane_widths(bits):
        per_byte = 8 // width
        place = (index % per_byte * width).to(torch.uint8)
        codes |= (packed[:, first_byte + index // per_byte] >> place & (2**width - 1)) << shift
        first_byte += -(-columns // per_byte)
        shift += width
    return codes
