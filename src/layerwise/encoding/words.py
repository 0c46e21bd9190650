"""Codes in 32-bit words, as GPTQ, AWQ and compressed-tensors checkpoints hold them.

Dense: the codes of a row are one stream of bits, the first code in the lowest bits of the first word; a code may lie
across two words. At 2, 4 and 8 bits none does, so that every reader agrees; at other widths older packages began a
new word instead (``loose``), which ``unpack_loose`` reads.

    row of 3-bit codes c0 c1 ..      word 0: [c10's low 2 bits | c9 .. c1 c0]     word 1: [.. c11 | c10's high bit]
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

ROWS_AT_ONCE = 1 << 22  # codes, so that their single bits stay small in memory


def word_count(count: int, bits: int) -> int:
    """Words that a row of ``count`` codes takes, packed densely."""
    return -(-count * bits // 32)


def loose_count(count: int, bits: int) -> int:
    """The same where no code lies across two words."""
    return -(-count // (32 // bits))


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """``codes`` [rows, columns] uint8, each below ``2**bits``  ->  int32 [rows, word_count(columns, bits)]."""
    rows, columns = codes.shape
    words = torch.zeros(rows, word_count(columns, bits), dtype=torch.int32)
    step = max(1, ROWS_AT_ONCE // max(1, columns))
    for start in range(0, rows, step):
        part = codes[start : start + step].contiguous().numpy()
        single = np.unpackbits(part[..., None], axis=-1, bitorder="little")[..., :bits]
        stream = np.packbits(single.reshape(len(part), -1), axis=1, bitorder="little")
        padded = np.zeros((len(part), words.shape[1] * 4), np.uint8)
        padded[:, : stream.shape[1]] = stream
        words[start : start + step] = torch.from_numpy(padded.view("<i4").astype(np.int32))
    return words


def unpack_words(words: Tensor, columns: int, bits: int) -> Tensor:
    """The inverse of ``pack_words``: int32 [rows, words]  ->  codes uint8 [rows, columns]."""
    rows = words.shape[0]
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    step = max(1, ROWS_AT_ONCE // max(1, columns))
    for start in range(0, rows, step):
        part = np.ascontiguousarray(words[start : start + step].numpy()).astype("<i4").view(np.uint8)
        single = np.unpackbits(part, axis=1, bitorder="little", count=columns * bits)
        codes[start : start + step] = torch.from_numpy(
            np.packbits(single.reshape(len(part), columns, bits), axis=-1, bitorder="little")[..., 0]
        )
    return codes


def unpack_loose(words: Tensor, columns: int, bits: int) -> Tensor:
    """Codes of words that each hold ``32 // bits`` whole ones: uint8 [rows, columns]."""
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    codes = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(1)[:, :columns].to(torch.uint8)
