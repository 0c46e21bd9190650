"""Trits, five to a byte, packed row by row. Layout version 1.

A trit is -1, 0 or 1 and has the code 0, 1 or 2. Five codes t0 .. t4 are the number ``v = sum_k t_k 3^(4-k) <= 242``,
stored as the byte ``b = ceil(256 v / 243)``, from which every code is read without a division:

    t_k = (3 * ((b * 3^k) mod 256)) >> 8

so ``b / 256`` is a fraction whose ternary digits are the codes, first column first. 1.6 bits a trit, where the least
possible is log2 3 = 1.585. Each row ends on a whole byte, the unused places being the code 1 (a weight of zero). 243 of
the 256 bytes mean something; ``check_trits`` refuses the others, so equal trits have equal bytes.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from layerwise.errors import InputError

PER_BYTE = 5
POWERS = (81, 27, 9, 3, 1)


def trit_bytes(columns: int) -> int:
    """Bytes of one packed row."""
    return -(-columns // PER_BYTE)


def pack_trits(codes: Tensor) -> Tensor:
    """``codes`` [rows, columns] uint8, each 0, 1 or 2  ->  [rows, trit_bytes] uint8."""
    rows, columns = codes.shape
    padded = torch.ones(rows, PER_BYTE * trit_bytes(columns), dtype=torch.int32, device=codes.device)
    padded[:, :columns] = codes
    number = (padded.view(rows, -1, PER_BYTE) * torch.tensor(POWERS, dtype=torch.int32, device=codes.device)).sum(2)
    return ((256 * number + 242) // 243).to(torch.uint8)


def unpack_trits(packed: Tensor, columns: int) -> Tensor:
    """The inverse of ``pack_trits``: [rows, trit_bytes] uint8  ->  codes [rows, columns] uint8."""
    found = _codes_of_byte().to(packed.device)[packed.int()]  # [rows, bytes, 5]
    return found.view(packed.shape[0], PER_BYTE * packed.shape[1])[:, :columns]


def check_trits(packed: Tensor, columns: int) -> None:
    """Refuse bytes that ``pack_trits`` does not write, and rows whose unused places hold a weight."""
    if not bool(_written().to(packed.device)[packed.int()].all()):
        raise InputError("a byte of packed trits is none of the 243 that five trits make")
    spare = PER_BYTE * packed.shape[1] - columns
    if spare and not bool((_codes_of_byte().to(packed.device)[packed[:, -1].int()][:, PER_BYTE - spare :] == 1).all()):
        raise InputError("the places behind the last column of packed trits must be zero")


@cache
def _codes_of_byte() -> Tensor:
    """byte -> its five codes: uint8 [256, 5]."""
    byte = torch.arange(256, dtype=torch.int32)
    return torch.stack([(3 * ((byte * 3**k) % 256)) >> 8 for k in range(PER_BYTE)], 1).to(torch.uint8)


@cache
def _written() -> Tensor:
    """Which bytes stand for five trits: bool [256]."""
    known = torch.zeros(256, dtype=torch.bool)
    known[[-(-256 * number // 243) for number in range(243)]] = True
    return known
