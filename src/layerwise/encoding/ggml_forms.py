"""Blocks of ggml as stored forms of ours that decode to the very same numbers.

Q4_0, Q5_0 and Q8_0 become integer grids in groups of 32: symmetric where every scale is positive. A negative scale
turns the levels around, ``d (q - m) = -d ((2^b - 1 - q) - (2^b - 1 - m))``, which takes a grid with zero points. A
block whose scale is zero gets the smallest step and the code of zero. Q4_1 and Q5_1, ``d q + m``, are a sum: an integer
grid with zero points of zero, and the offsets ``m`` as a low-rank form, one row an offset for each of 32 columns, whose
other factor (which columns are whose) is stored in two bits.

Steps of two factors, those of the types of 256 columns, fit no grid of ours: their blocks are a form as they are
(``superblocks``).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerwise.encoding.dense import Dense
from layerwise.encoding.encoded import Encoded
from layerwise.encoding.ggml_blocks import SHIFTED, SIGNED, TYPES, Bytes, pack_codes, unpack
from layerwise.encoding.grid import SMALLEST_STEP, FittedGrid, Grid
from layerwise.encoding.integer import GroupedInteger
from layerwise.encoding.lowrank import LowRank
from layerwise.encoding.sums import Sum
from layerwise.encoding.superblocks import HALVES, Superblock
from layerwise.errors import InputError

BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8}
READ = (*BITS, *HALVES)  # types that have a form
RUN = 32


def values_of(name: str, packed: Bytes, columns: int) -> Tensor:
    """What blocks stand for: uint8 [rows, row bytes] -> float32 [rows, columns]."""
    if name in HALVES:
        return Superblock(torch.from_numpy(packed), columns, name).decode()
    levels, scales, offsets = unpack(name, packed.reshape(-1, TYPES[name].nbytes))
    values = levels.astype(np.float32) * scales.astype(np.float32)[:, None]
    if offsets is not None:
        values += offsets.astype(np.float32)[:, None]
    return torch.from_numpy(values.reshape(packed.shape[0], columns))


def form_of(name: str, packed: Bytes, columns: int) -> Encoded:
    """The form of rows of blocks. Raises ``InputError`` for scales that are no finite numbers, and for those of Q4_1
    and Q5_1 below zero, which no writer of such files makes."""
    if name in HALVES:
        return Superblock.of(name, torch.from_numpy(packed), columns)
    rows = packed.shape[0]
    levels, scales, offsets = unpack(name, packed.reshape(-1, TYPES[name].nbytes))
    if not np.isfinite(scales).all() or (offsets is not None and not np.isfinite(offsets).all()):
        raise InputError(f"blocks of type {name} have scales that are not finite")
    if offsets is not None and (scales < 0).any():
        raise InputError(f"blocks of type {name} have negative scales, which layerwise has no form for")
    bits, top = BITS[name], 2 ** BITS[name] - 1
    codes = (levels if name in SHIFTED else levels - SIGNED[name][0]).astype(np.uint8)
    middle = 0 if name in SHIFTED else 2 ** (bits - 1)
    negative = scales < 0
    zeros = np.where(negative, top - middle, middle).astype(np.uint8)
    codes[negative] = top - codes[negative]
    empty = scales == 0
    codes[empty] = zeros[empty][:, None]
    steps = np.where(empty, np.float16(SMALLEST_STEP), np.abs(scales)).astype(np.float16)

    def by_row(values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values.reshape(rows, -1).copy())

    symmetric = offsets is None and not bool(negative.any())
    grid = Grid(bits, RUN, symmetric=symmetric)
    fitted = FittedGrid(grid, columns, by_row(steps), None, None if symmetric else by_row(zeros))
    whole = GroupedInteger.from_codes(by_row(codes), fitted)
    return whole if offsets is None else Sum(whole, _offsets(by_row(offsets), columns))


def offset_type(form: Sum) -> str | None:
    """The type whose blocks a sum came from (``form_of``), None where it is another sum."""
    whole, offsets = form.first, form.second
    if not isinstance(whole, GroupedInteger) or not isinstance(offsets, LowRank) or form.shape[1] % RUN:
        return None
    grid, left = whole.grid, offsets.left
    known = grid in (Grid(4, RUN), Grid(5, RUN)) and whole.fitted.zero is not None
    if not known or bool(whole.fitted.zero.any()) or not isinstance(left, Dense):  # type: ignore[union-attr]
        return None
    if left.values.dtype != torch.float16 or left.shape[0] != form.shape[1] // RUN:
        return None
    shown = _offsets(left.values.T, form.shape[1]).right
    return f"Q{grid.bits}_1" if torch.equal(shown.decode(), offsets.right.decode()) else None


def blocks_of(name: str, form: Sum) -> Bytes:
    """The blocks [rows, row bytes] of a sum for which ``offset_type`` is ``name``."""
    whole, offsets = form.first, form.second
    assert isinstance(whole, GroupedInteger) and isinstance(offsets, LowRank) and isinstance(offsets.left, Dense)
    rows, columns = form.shape
    steps = whole.fitted.scale.numpy()
    levels = whole.codes().numpy().astype(np.int16).reshape(-1, RUN)
    packed = pack_codes(name, levels, steps.reshape(-1), offsets.left.values.T.contiguous().numpy().reshape(-1))
    return packed.reshape(rows, columns // RUN * TYPES[name].nbytes)


def _offsets(offsets: Tensor, columns: int) -> LowRank:
    """``offsets`` [rows, groups] fp16, each over 32 columns."""
    groups = offsets.shape[1]
    shown = (torch.arange(columns)[None] // RUN == torch.arange(groups)[:, None]).to(torch.uint8)
    ones, zeros = torch.ones(groups, 1, dtype=torch.float16), torch.zeros(groups, 1, dtype=torch.uint8)
    where = GroupedInteger.from_codes(shown, FittedGrid(Grid(2, 0), columns, ones, None, zeros))
    return LowRank(Dense(offsets.T.contiguous()), where)
