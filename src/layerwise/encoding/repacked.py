"""Stored forms as the compiled kernels take them.

Integers of 2 to 8 bits (symmetric, with whole and with float zeros), codebooks and ternary planes, with fp16 and 8-bit
scales, have kernels; groups must be a multiple of four columns or the whole row, which is what a kernel's lane holds.
Every other form, and every form where the library is absent, multiplies through its reference (``Encoded.multiply``).
"""

from __future__ import annotations

import torch

from layerwise.encoding.codebook import LEVELS, Codebook
from layerwise.encoding.encoded import Encoded
from layerwise.encoding.float8 import float8_values
from layerwise.encoding.grid import FittedGrid
from layerwise.encoding.integer import GroupedInteger
from layerwise.encoding.scales import width_of
from layerwise.encoding.ternary import Ternary
from layerwise.kernels.library import chosen_path
from layerwise.kernels.matrix import Canonical, PackedMatrix

LANE = 4


def repack(form: Encoded) -> PackedMatrix | None:
    """``form`` in the layout of the kernels; None where it is not theirs or there are none."""
    stored = canonical(form)
    return None if stored is None or chosen_path() is None else PackedMatrix(stored)


def canonical(form: Encoded) -> Canonical | None:
    """What the kernels need of ``form``, or None where they have no product for it."""
    if isinstance(form, GroupedInteger):
        grid = form.grid
        stored = _of_grid(form.fitted, form.packed, grid.bits)
        zero = None if form.fitted.zero is None else form.fitted.zero
        stored = Canonical(**{**vars(stored), "zero": zero, "centre": grid.middle})
    elif isinstance(form, Codebook):
        levels = torch.tensor(LEVELS[form.name])
        stored = Canonical(**{**vars(_of_grid(form.fitted, form.packed, 4)), "levels": levels})
    elif isinstance(form, Ternary):
        rows, columns = form.shape
        stored = Canonical(
            rows, columns, 2, width_of(form.group, columns), form.packed, form.scales.stored, form.scales.factor,
            centre=1, planes=form.planes, trits=True,
        )  # fmt: skip
    else:
        return None
    on_cpu = stored.codes.device.type == "cpu"
    return stored if on_cpu and (stored.group % LANE == 0 or stored.group >= stored.columns) else None


def _of_grid(fitted: FittedGrid, packed: torch.Tensor, bits: int) -> Canonical:
    rows, columns = packed.shape[0], fitted.columns
    scale, factor = fitted.scale, fitted.factor
    if fitted.grid.float_scale:
        assert factor is not None
        scale, factor = float8_values(scale).half(), factor.expand(rows)  # every E4M3 number is an fp16 number
    return Canonical(rows, columns, bits, fitted.grid.width(columns), packed, scale, factor)
