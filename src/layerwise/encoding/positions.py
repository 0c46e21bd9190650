"""Which entries of a matrix are stored: as one bit an entry, or as two of every four columns.

=========  ====================================  ==========================================================
pattern    bytes of a row of n columns           a row
=========  ====================================  ==========================================================
``mask``   ceil(n / 8)                           one bit a column, the first column in the lowest bit
``2:4``    ceil(ceil(n / 4) / 3)                 one digit 0..5 per four columns, three digits to a byte
=========  ====================================  ==========================================================

Four columns keep exactly two, in one of six ways: columns 01, 02, 03, 12, 13, 23 are the digits 0 to 5. Three of them
are a byte ``d0 + 6 d1 + 36 d2 <= 215``: two thirds of a bit a weight, where a mask (or two 2-bit positions, which is
the same) takes one. A last run of one, two or three columns keeps one, two or two; the digit of a single column is 0.
Unused bits and digits are 0, so equal positions have equal bytes. Each row ends on a whole byte.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations

import torch
from torch import Tensor

from layerwise.encoding.bitplanes import pack, row_bytes, unpack

PATTERNS = ("mask", "2:4")
PAIRS = tuple(combinations(range(4), 2))  # digit -> the two columns
LARGEST_BYTE = 6**3 - 1


def position_bytes(columns: int, pattern: str) -> int:
    """Bytes of the positions of one row."""
    return row_bytes(columns, 1) if pattern == "mask" else -(-fours(columns) // 3)


def fours(columns: int) -> int:
    """Runs of four columns, the short last one included."""
    return -(-columns // 4)


def kept_of_fours(columns: int) -> int:
    """Entries that a row keeps in the pattern 2:4."""
    return columns // 4 * 2 + min(2, columns % 4)


def pack_positions(mask: Tensor, pattern: str) -> Tensor:
    """``mask`` [rows, columns] bool -> [rows, position_bytes] uint8; a 2:4 mask must be one (see above)."""
    if pattern == "mask":
        return pack(mask.to(torch.uint8), 1)
    rows, columns = mask.shape
    padded = torch.zeros(rows, fours(columns), 4, dtype=torch.bool, device=mask.device)
    padded.view(rows, -1)[:, :columns] = mask
    if columns % 4 == 1:
        padded[:, -1, 1] = True  # the digit of a single column
    nibbles = (padded * torch.tensor([1, 2, 4, 8], device=mask.device)).sum(2)
    digits = torch.zeros(rows, 3 * position_bytes(columns, pattern), dtype=torch.uint8, device=mask.device)
    found = _digit_of_nibble().to(mask.device)[nibbles]
    if bool((found > 5).any()):
        raise ValueError("a 2:4 mask keeps two of every four columns")
    digits[:, : found.shape[1]] = found
    triples = digits.view(rows, -1, 3)
    return triples[..., 0] + 6 * triples[..., 1] + 36 * triples[..., 2]


def unpack_positions(packed: Tensor, columns: int, pattern: str) -> Tensor:
    """The inverse of ``pack_positions``: bool [rows, columns]."""
    if pattern == "mask":
        return unpack(packed, columns, 1).view(torch.bool)
    table = _columns_of_byte().to(packed.device)
    return table[packed.long()].reshape(packed.shape[0], 12 * packed.shape[1])[:, :columns]


@cache
def _columns_of_byte() -> Tensor:
    """byte -> which of its twelve columns are kept: bool [256, 12]; bytes above 215 mean nothing and keep nothing."""
    kept = torch.zeros(256, 3, 4, dtype=torch.bool)
    for byte in range(LARGEST_BYTE + 1):
        for place in range(3):
            kept[byte, place, list(PAIRS[byte // 6**place % 6])] = True
    return kept.view(256, 12)


@cache
def _digit_of_nibble() -> Tensor:
    """Four bits, first column lowest -> digit; 255 where not exactly two are set."""
    digits = torch.full((16,), 255, dtype=torch.uint8)
    for digit, (a, b) in enumerate(PAIRS):
        digits[(1 << a) | (1 << b)] = digit
    return digits
