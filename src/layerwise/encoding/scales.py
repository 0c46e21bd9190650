"""Scales of a form that has no zero points: fp16, or eight bits beside one fp16 factor a row.

=================  ==============================  =========================================
stored tensor      type and shape                  holds
=================  ==============================  =========================================
``_scale``         fp16 or uint8 [rows, count]     scales, or their codes 0..255
``_scale_factor``  fp16 [rows]                     with 8-bit scales: scale = code * factor
=================  ==============================  =========================================

Unlike the steps of a grid, scales are rounded to the nearest stored value (no weight has to stay inside a range) and
may be zero, which makes the whole group zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.encoding.encoded import Layout
from layerwise.errors import InputError

LARGEST = 65504.0


@dataclass(frozen=True, eq=False)
class Scales:
    """``stored`` [rows, count] fp16 or uint8, ``factor`` [rows] fp16 with 8-bit scales."""

    stored: Tensor
    factor: Tensor | None

    @staticmethod
    def of(wanted: Tensor, bits: int) -> Scales:
        """The nearest stored scales to ``wanted`` [rows, count], none negative."""
        wanted = wanted.float()
        largest = float(wanted.max())
        if not largest <= LARGEST * (255 if bits == 8 else 1):
            raise InputError(
                f"a group of weights would need a scale of {largest:.3g}, above fp16's largest number {LARGEST:g}; "
                f"scale the weight down or keep it dense in fp32"
            )
        if bits == 16:
            return Scales(wanted.half(), None)
        factor = (wanted.amax(1) / 255).half()
        codes = torch.where(factor[:, None] > 0, wanted / factor.float()[:, None], torch.zeros_like(wanted))
        return Scales(codes.round().clamp(0, 255).to(torch.uint8), factor)

    @property
    def bits(self) -> int:
        return 16 if self.factor is None else 8

    def values(self) -> Tensor:
        """The scales: float32 [rows, count]."""
        scale = self.stored.float()
        return scale if self.factor is None else scale * self.factor.float()[:, None]

    def select(self, rows: slice | Tensor) -> Scales:
        return Scales(self.stored[rows], None if self.factor is None else self.factor[rows])

    def tensors(self) -> dict[str, Tensor]:
        return {"_scale": self.stored} | ({} if self.factor is None else {"_scale_factor": self.factor})

    @staticmethod
    def restore(tensors: Mapping[str, Tensor], form: str) -> Scales:
        """From tensors of the right types and shapes; refuses values that are negative or not finite."""
        found = Scales(tensors["_scale"], tensors.get("_scale_factor"))
        for stored in (found.stored, found.factor):
            if stored is not None and not bool((torch.isfinite(stored) & (stored >= 0)).all()):
                raise InputError(f"scales of {form} form must be finite and not negative")
        return found


def scales_layout(rows: int, count: int, bits: int) -> Layout:
    """Suffix -> (dtype, shape) of ``count`` scales a row."""
    layout: Layout = {"_scale": (torch.uint8 if bits == 8 else torch.float16, (rows, count))}
    return layout | ({"_scale_factor": (torch.float16, (rows,))} if bits == 8 else {})


def check_group(group: object, bits: object) -> tuple[int, int]:
    """``group`` columns a scale, 0 for the whole row, and 8 or 16 ``bits``; raises ``InputError`` for anything else."""
    if type(group) is not int or group < 0:
        raise InputError(f"a group is a number of columns, or 0 for the whole row, not {group!r}")
    if type(bits) is not int or bits not in (8, 16):
        raise InputError(f"scales are stored in 8 or 16 bits, not {bits!r}")
    return group, bits


def width_of(group: int, columns: int) -> int:
    """Columns of a full group."""
    return columns if group == 0 else min(group, columns)


def groups_of(group: int, columns: int) -> int:
    """Groups of a row, the short last one included."""
    return -(-columns // width_of(group, columns))


def places(group: int, columns: int) -> Tensor:
    """The group of every column: int64 [columns]."""
    return torch.arange(columns) // width_of(group, columns)


def by_group(values: Tensor, group: int) -> Tensor:
    """``values`` [..., columns] -> [..., groups, width], the last group filled up with zeros."""
    columns = values.shape[-1]
    width, groups = width_of(group, columns), groups_of(group, columns)
    return torch.nn.functional.pad(values, (0, groups * width - columns)).reshape(*values.shape[:-1], groups, width)
