"""Triton kernels of ``y = x W^T`` over a matrix as it is stored; ``gpu.py`` chooses between them and calls them.

Nothing is repacked: the kernels read the codes, scales and zeros where the file's tensors lie on the device, and decode
in registers. A tile is BLOCK_N rows by BLOCK_K columns, each weight what the stored form decodes to, in float32:

    W[r, k] = sum over planes of  s[r, g] (q[r, k] - z[r, g])        or  s[r, g] levels[q[r, k]],   g the group of k

``few_tokens`` multiplies float32 by float32 and sums the lanes of a tile once, at the end. ``many_tokens`` rounds the
tile to the activations' type, as the dense product in that type does, and hands it to the tensor cores with float32
sums. Both may cut the columns into SPLIT parts, whose sums the caller adds in their order: no atomic additions, so that
the same inputs give the same bits.

Importing this file imports Triton. Where the environment has TRITON_INTERPRET=1, calls are interpreted on the CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def few_tokens(
    x: tl.tensor, codes: tl.tensor, scale: tl.tensor, factor: tl.tensor, zero: tl.tensor, levels: tl.tensor,
    y: tl.tensor, tokens: tl.tensor, rows: tl.tensor, columns: tl.tensor, groups: tl.tensor, group: tl.tensor,
    row_bytes: tl.tensor, fours: tl.tensor, twos: tl.tensor, ones: tl.tensor,
    BITS: tl.constexpr, TRITS: tl.constexpr, PLANES: tl.constexpr, CENTRE: tl.constexpr, RUN: tl.constexpr,
    TOKENS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """y [SPLIT, tokens, rows] from x [tokens, columns]; TOKENS is a power of two not below ``tokens``.

    The grid is (tiles of rows, SPLIT).
    """
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, BLOCK_N, BLOCK_K), tl.float32)
    for start in range(tl.program_id(1) * BLOCK_K, columns, SPLIT * BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        weight = _decoded(
            codes, scale, factor, zero, levels, row, start, rows, columns, groups, group,
            row_bytes, fours, twos, ones,
            BITS, TRITS, PLANES, CENTRE, RUN, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        inside = (token < tokens)[:, None] & (column < columns)[None, :]
        given = tl.load(x + token[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total = tl.fma(given[:, None, :], weight[None, :, :], total)
    inside = (token < tokens)[:, None] & (row < rows)[None, :]
    place = (tl.program_id(1) * tokens + token[:, None]).to(tl.int64) * rows + row[None, :]
    tl.store(y + place, tl.sum(total, 2).to(y.dtype.element_ty), mask=inside)


@triton.jit
def many_tokens(
    x: tl.tensor, codes: tl.tensor, scale: tl.tensor, factor: tl.tensor, zero: tl.tensor, levels: tl.tensor,
    y: tl.tensor, tokens: tl.tensor, rows: tl.tensor, columns: tl.tensor, groups: tl.tensor, group: tl.tensor,
    row_bytes: tl.tensor, fours: tl.tensor, twos: tl.tensor, ones: tl.tensor,
    BITS: tl.constexpr, TRITS: tl.constexpr, PLANES: tl.constexpr, CENTRE: tl.constexpr, RUN: tl.constexpr,
    TOKENS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDENED: tl.constexpr,
) -> None:  # fmt: skip
    """y [SPLIT, tokens, rows] from x [tokens, columns], in tiles of TOKENS tokens, at least 16.

    The grid is (tiles of rows, tiles of tokens, SPLIT). WIDENED: multiply the rounded numbers as float32, which gives
    the same products; Triton's interpreter multiplies the bit patterns of bfloat16 ones.
    """
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    from_token = x + token.to(tl.int64)[:, None] * columns
    total = tl.zeros((TOKENS, BLOCK_N), tl.float32)
    for start in range(tl.program_id(2) * BLOCK_K, columns, SPLIT * BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = (token < tokens)[:, None] & (column < columns)[None, :]
        given = tl.load(from_token + column[None, :], mask=inside, other=0.0)
        weight = _decoded(
            codes, scale, factor, zero, levels, row, start, rows, columns, groups, group,
            row_bytes, fours, twos, ones,
            BITS, TRITS, PLANES, CENTRE, RUN, BLOCK_N, BLOCK_K,
        ).to(given.dtype)  # fmt: skip
        if WIDENED:
            given, weight = given.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(given, tl.trans(weight), total, input_precision="ieee")
    inside = (token < tokens)[:, None] & (row < rows)[None, :]
    place = (tl.program_id(2) * tokens + token[:, None]).to(tl.int64) * rows + row[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _decoded(
    codes: tl.tensor, scale: tl.tensor, factor: tl.tensor, zero: tl.tensor, levels: tl.tensor,
    row: tl.tensor, start: tl.tensor, rows: tl.tensor, columns: tl.tensor, groups: tl.tensor, group: tl.tensor,
    row_bytes: tl.tensor, fours: tl.tensor, twos: tl.tensor, ones: tl.tensor,
    BITS: tl.constexpr, TRITS: tl.constexpr, PLANES: tl.constexpr, CENTRE: tl.constexpr, RUN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The tile of ``row`` and the columns from ``start`` on: float32 [BLOCK_N, BLOCK_K], zero outside the matrix.

    Every RUN columns, counted from ``start``, lie in one group, so that a scale is read once for them.
    """
    known = row < rows
    offset = row.to(tl.int64)
    runs = start + RUN * tl.arange(0, BLOCK_K // RUN)
    step_inside = known[:, None] & (runs < columns)[None, :]
    weight = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for plane in tl.static_range(PLANES):
        place = (offset[:, None] * PLANES + plane) * groups + (runs // group)[None, :]
        step = tl.load(scale + place, mask=step_inside, other=0).to(tl.float32)
        if factor is not None:
            step *= tl.load(factor + row, mask=known, other=0).to(tl.float32)[:, None]
        step = _spread(step, RUN, BLOCK_N, BLOCK_K)
        if TRITS:
            first = codes + (offset * PLANES + plane) * (row_bytes // PLANES)
            value = _trits(first, known, start, columns, BLOCK_K).to(tl.float32) - CENTRE
        else:
            code = _integers(
                codes + offset * row_bytes, known, start, columns, fours, twos, ones, BITS, BLOCK_N, BLOCK_K
            )
            if levels is not None:
                value = tl.load(levels + code)
            elif zero is None:
                value = code.to(tl.float32) - CENTRE
            else:
                centre = tl.load(zero + place, mask=step_inside, other=0).to(tl.float32)
                value = code.to(tl.float32) - _spread(centre, RUN, BLOCK_N, BLOCK_K)
        weight += value * step
    return weight


@triton.jit
def _spread(values: tl.tensor, RUN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr) -> tl.tensor:
    """[BLOCK_N, BLOCK_K / RUN] -> [BLOCK_N, BLOCK_K], each value RUN times in a row."""
    return tl.reshape(tl.broadcast_to(values[:, :, None], (BLOCK_N, BLOCK_K // RUN, RUN)), (BLOCK_N, BLOCK_K))


@triton.jit
def _integers(
    first: tl.tensor, known: tl.tensor, start: tl.tensor,
    columns: tl.tensor, fours: tl.tensor, twos: tl.tensor, ones: tl.tensor,
    BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Codes of rows whose bytes begin at ``first`` [BLOCK_N], as ``encoding/bitplanes.py`` packs them: int32."""
    code = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    if BITS & 8:
        code |= _bits(first, known, start, columns, 8, BLOCK_N, BLOCK_K)
    if BITS & 4:
        code |= _bits(first, known, start, fours, 4, BLOCK_N, BLOCK_K)
        first += fours
    if BITS & 2:
        code |= _bits(first, known, start, twos, 2, BLOCK_N, BLOCK_K) << (BITS & 4)
        first += twos
    if BITS & 1:
        code |= _bits(first, known, start, ones, 1, BLOCK_N, BLOCK_K) << (BITS & 6)
    return code


@triton.jit
def _bits(
    first: tl.tensor, known: tl.tensor, start: tl.tensor, size: tl.tensor,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """One plane of WIDTH bits a code and ``size`` bytes a row: each byte is read once and cut into its codes."""
    PER_BYTE: tl.constexpr = 8 // WIDTH
    byte = start // PER_BYTE + tl.arange(0, BLOCK_K // PER_BYTE)
    inside = known[:, None] & (byte < size)[None, :]
    held = tl.load(first[:, None] + byte[None, :], mask=inside, other=0).to(tl.int32)
    shift = WIDTH * tl.arange(0, PER_BYTE)
    return tl.reshape(held[:, :, None] >> shift[None, None, :] & ((1 << WIDTH) - 1), (BLOCK_N, BLOCK_K))


@triton.jit
def _trits(
    first: tl.tensor, known: tl.tensor, start: tl.tensor, columns: tl.tensor, BLOCK_K: tl.constexpr
) -> tl.tensor:
    """Codes 0, 1 and 2, five to a byte, as ``encoding/trits.py`` packs them: int32 [BLOCK_N, BLOCK_K].

    Five is no power of two, so a byte is read at each of its columns; all reads but the first meet the cache.
    """
    column = start + tl.arange(0, BLOCK_K)
    place = column % 5
    power = tl.where(place == 0, 1, tl.where(place == 1, 3, tl.where(place == 2, 9, tl.where(place == 3, 27, 81))))
    inside = known[:, None] & (column < columns)[None, :]
    held = tl.load(first[:, None] + (column // 5)[None, :], mask=inside, other=0).to(tl.int32)
    return 3 * (held * power[None, :] & 255) >> 8
