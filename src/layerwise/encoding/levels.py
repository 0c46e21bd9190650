"""Stored forms as whole-number levels times an fp16 step for every 32 columns, where they are that.

Formats of other tools (ggml's blocks, ONNX's ``MatMulNBits``) keep a short integer for each weight and a scale for a
short run of columns. A form whose weights are ``step * level`` with runs that are whole multiples of theirs can be
written there without a change of any value: a step of a longer group is repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerwise.encoding.binary import Binary
from layerwise.encoding.codebook import LEVELS, Codebook
from layerwise.encoding.encoded import Encoded
from layerwise.encoding.grid import group_of
from layerwise.encoding.integer import GroupedInteger
from layerwise.encoding.ternary import Ternary

RUN = 32  # columns that share a step


@dataclass(frozen=True)
class Levels:
    """``rows(start, stop)`` gives (levels int16 [n, columns], steps fp16 [n, columns / 32]) of some rows."""

    shape: tuple[int, int]
    rows: Callable[[int, int], tuple[NDArray[np.int16], NDArray[np.float16]]]


def levels_of(form: Encoded, near: bool = False) -> Levels | str:
    """The levels of a form, or a sentence's end that says why it has none: "has a float zero".

    near: steps that fp16 does not hold are rounded to it, which changes a weight by at most 1 part in 2048.
    """
    rows, columns = form.shape
    if columns % RUN:
        return f"has {columns} columns, no multiple of {RUN}"
    if isinstance(form, GroupedInteger):
        if form.grid.float_zero:
            return "has a zero point that is no whole number (float_zero)"
        width, steps = form.grid.width(columns), form.fitted.steps()
        levels = _integer(form)
    elif isinstance(form, Codebook):
        if form.name != "e2m1":
            return f"is a look-up in the table {form.name}, whose levels are no whole multiples of a step"
        width, steps = form.fitted.grid.width(columns), form.fitted.steps() / 2
        levels = _table(form)
    elif isinstance(form, Ternary):
        if form.planes > 1:
            return f"is a sum of {form.planes} ternary planes"
        width, steps = columns if form.group == 0 else min(form.group, columns), form.scales.values()
        levels = _plain(form, lambda codes: codes[:, 0] - 1)
    elif isinstance(form, Binary):
        if form.mean is not None:
            return "is binary around a mean of each row"
        width, steps = columns if form.group == 0 else min(form.group, columns), form.scales.values()
        levels = _plain(form, lambda codes: 2 * codes - 1)
    else:
        return f"is of the form {form.form}"
    if width % RUN:
        return f"has groups of {width} columns, no multiple of {RUN}"
    half = steps.half()
    if not near and not torch.equal(half.float(), steps):
        return "has steps that fp16 does not hold (8-bit scales times a factor)"
    if not bool(torch.isfinite(half).all()):
        return "has steps beyond fp16's largest number"
    spread = torch.arange(0, columns, RUN) // width

    def part(start: int, stop: int) -> tuple[NDArray[np.int16], NDArray[np.float16]]:
        return levels(start, stop).to(torch.int16).numpy(), half[start:stop, spread].numpy()

    return Levels((rows, columns), part)


def half_holds(form: Encoded) -> bool:
    """Whether fp16 holds every value, as it does those of a pruned weight that keeps its own."""
    for start, stop in form.row_chunks():
        values = form.decode_rows(start, stop)
        if not torch.equal(values.half().float(), values):
            return False
    return True


def _integer(form: GroupedInteger) -> Callable[[int, int], Tensor]:
    from layerwise.encoding.bitplanes import unpack

    spread = group_of(form.shape[1], form.grid)

    def levels(start: int, stop: int) -> Tensor:
        codes = unpack(form.packed[start:stop], form.shape[1], form.grid.bits).to(torch.int16)
        if form.fitted.zero is None:
            return codes - form.grid.middle
        return codes - form.fitted.zero[start:stop].to(torch.int16)[:, spread]

    return levels


def _table(form: Codebook) -> Callable[[int, int], Tensor]:
    whole = torch.tensor([round(2 * level) for level in LEVELS["e2m1"]], dtype=torch.int16)
    return _plain(form, lambda codes: whole[codes.long()])


def _plain(form: Codebook | Ternary | Binary, of: Callable[[Tensor], Tensor]) -> Callable[[int, int], Tensor]:
    codes = form.codes()
    return lambda start, stop: of(codes[start:stop].to(torch.int16))
