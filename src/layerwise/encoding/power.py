"""Form ``power``: integers whose values follow a power, times a scale per group.

    w' = s sign(c) (|c| / c_max)^(1 / a),    c in -c_max .. c_max,    c_max = 2^(b-1) - 1,    0 < a <= 1

=================  ====================================  ======================================================
stored tensor      type and shape                        holds
=================  ====================================  ======================================================
``""``             uint8 [rows * row_bytes(n, bits)]     packed codes ``c + c_max``, see ``bitplanes``
``_scale``         fp16 or uint8 [rows, groups]          s, the value of the largest code, or its code
``_scale_factor``  fp16 [rows]                           only with 8-bit scales: scale = code * factor
``_exponent``      uint8 [rows] or [1]                   a in 64ths, 1 .. 64: one a row, or one for the matrix
=================  ====================================  ======================================================

``decode`` is ``level[code] * scale`` in float32; the levels of an exponent are computed in float64 and rounded once.
The product of two levels of one exponent is the level of the product of their codes, which is what the power is for:
``(|c1| |c2|)^(1/a)``. a = 1 is a symmetric grid. The code ``2^b - 1`` is never written and decodes to the largest
level. bits per weight = b + 16 / g, or b + 8 / g + 16 / n with 8-bit scales, and 8 / n with an exponent a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerwise.encoding.bitplanes import LAYOUT_VERSION, pack, row_bytes, unpack
from layerwise.encoding.encoded import Layout, PackedRows
from layerwise.encoding.integer import check_tensors, check_version, stored_shape
from layerwise.encoding.scales import Scales, check_group, groups_of, places, scales_layout
from layerwise.errors import InputError

PARTS = 64  # an exponent is a number of 64ths


@dataclass(frozen=True, eq=False)
class Power(PackedRows):
    """Packed codes ``[rows, row_bytes]`` uint8, the scales of their groups, and exponents ``[rows]`` or ``[1]``."""

    form: ClassVar[str] = "power"
    packed: Tensor
    columns: int
    bits: int
    group: int
    scales: Scales
    exponent: Tensor

    @staticmethod
    def from_codes(codes: Tensor, bits: int, group: int, scales: Scales, exponent: Tensor) -> Power:
        """Pack ``codes`` [rows, columns] uint8, each below ``2^bits - 1``; ``exponent`` uint8 [rows] or [1]."""
        return Power(pack(codes, bits), codes.shape[1], bits, group, scales, exponent)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.packed.shape[0], self.columns

    def codes(self) -> Tensor:
        """All codes, unpacked: uint8 [rows, columns]."""
        return unpack(self.packed, self.columns, self.bits)

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.packed.reshape(-1), **self.scales.tensors(), "_exponent": self.exponent}

    def spec(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "layout": LAYOUT_VERSION,
            "shape": list(self.shape),
            "bits": self.bits,
            "group": self.group,
            "scale_bits": self.scales.bits,
            "exponents": len(self.exponent),
        }

    @classmethod
    def restore(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Power:
        rows, columns = stored_shape(spec)
        check_version(spec, "codes")
        bits, exponents = spec.get("bits"), spec.get("exponents")
        if type(bits) is not int or not 2 <= bits <= 8:
            raise InputError(f"a power form has 2 to 8 bits, not {bits!r}")
        if type(exponents) is not int or exponents not in (1, rows):
            raise InputError(f"a power form has one exponent, or one for each of its {rows} rows, not {exponents!r}")
        group, scale_bits = check_group(spec.get("group"), spec.get("scale_bits"))
        check_tensors(power_layout(bits, group, scale_bits, exponents == rows, rows, columns), tensors)
        exponent = tensors["_exponent"]
        if not bool(((exponent >= 1) & (exponent <= PARTS)).all()):
            raise InputError(f"_exponent of a power form must be 1 to {PARTS}")
        packed = tensors[""].view(rows, row_bytes(columns, bits))
        return cls(packed, columns, bits, group, Scales.restore(tensors, "a power"), exponent)

    def _decode(self, rows: slice | Tensor) -> Tensor:
        codes = unpack(self.packed[rows], self.columns, self.bits)
        spread = places(self.group, self.columns).to(codes.device)
        levels = levels_of(self.bits).to(codes.device)  # [64, 2^bits]
        if len(self.exponent) == 1:
            values = levels[int(self.exponent) - 1][codes.int()]
        else:
            exponent = self.exponent[rows].int() - 1
            values = levels.view(-1)[exponent[:, None] * levels.shape[1] + codes.int()]
        return values.mul_(self.scales.select(rows).values()[:, spread])


@cache
def levels_of(bits: int) -> Tensor:
    """Place a - 1 -> the value of each code at an exponent of a / 64, the largest being 1: float32 [64, 2^bits]."""
    most = 2 ** (bits - 1) - 1
    size = (torch.arange(2**bits) - most).clamp(max=most).double() / most
    power = PARTS / torch.arange(1, PARTS + 1).double()
    return (size.sign() * size.abs() ** power[:, None]).float()


def power_layout(bits: int, group: int, scale_bits: int, by_row: bool, rows: int, columns: int) -> Layout:
    """Suffix -> (dtype, shape) of every tensor of a power form of this shape."""
    codes: Layout = {"": (torch.uint8, (rows * row_bytes(columns, bits),))}
    exponent: Layout = {"_exponent": (torch.uint8, (rows if by_row else 1,))}
    return codes | scales_layout(rows, groups_of(group, columns), scale_bits) | exponent
