"""Form ``ternary``: sums of one to four planes of -1, 0 and 1, each with a scale per group.

    W' = sum_p a_p t_p,    t_p in {-1, 0, 1}^(m x n),    a_p [rows, groups] >= 0

=================  =======================================  =====================================================
stored tensor      type and shape                           holds
=================  =======================================  =====================================================
``""``             uint8 [rows * planes * ceil(n / 5)]      trits, see ``trits``; the planes of a row side by side
``_scale``         fp16 or uint8 [rows, planes * groups]    scales, or their codes; plane by plane
``_scale_factor``  fp16 [rows]                              only with 8-bit scales: scale = code * factor
=================  =======================================  =====================================================

``decode`` adds the planes in their order, ``trit * scale`` each, in float32. bits per weight = planes (1.6 + 16 / g),
or planes (1.6 + 8 / g) + 16 / n with 8-bit scales: 1.725 for one plane and 3.45 for two at groups of 128.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerwise.encoding.bitplanes import LAYOUT_VERSION
from layerwise.encoding.encoded import Layout, PackedRows
from layerwise.encoding.integer import check_tensors, check_version, stored_shape
from layerwise.encoding.scales import Scales, check_group, groups_of, places, scales_layout
from layerwise.encoding.trits import check_trits, pack_trits, trit_bytes, unpack_trits
from layerwise.errors import InputError

MOST_PLANES = 4


@dataclass(frozen=True, eq=False)
class Ternary(PackedRows):
    """Packed trits ``[rows, planes, trit_bytes]`` uint8 and the scales ``[rows, planes * groups]`` of their groups."""

    form: ClassVar[str] = "ternary"
    packed: Tensor
    columns: int
    group: int
    scales: Scales

    @staticmethod
    def from_codes(codes: Tensor, group: int, scales: Scales) -> Ternary:
        """Pack ``codes`` [rows, planes, columns] uint8, each 0, 1 or 2 for -1, 0 and 1."""
        rows, planes, columns = codes.shape
        return Ternary(pack_trits(codes.reshape(-1, columns)).view(rows, planes, -1), columns, group, scales)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.packed.shape[0], self.columns

    @property
    def planes(self) -> int:
        return self.packed.shape[1]

    def codes(self) -> Tensor:
        """All codes, unpacked: uint8 [rows, planes, columns]."""
        return unpack_trits(self.packed.flatten(0, 1), self.columns).view(*self.packed.shape[:2], self.columns)

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.packed.reshape(-1), **self.scales.tensors()}

    def spec(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "layout": LAYOUT_VERSION,
            "shape": list(self.shape),
            "planes": self.planes,
            "group": self.group,
            "scale_bits": self.scales.bits,
        }

    @classmethod
    def restore(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Ternary:
        rows, columns = stored_shape(spec)
        check_version(spec, "trits")
        planes = spec.get("planes")
        if type(planes) is not int or not 1 <= planes <= MOST_PLANES:
            raise InputError(f"a ternary form has 1 to {MOST_PLANES} planes, not {planes!r}")
        group, bits = check_group(spec.get("group"), spec.get("scale_bits"))
        check_tensors(ternary_layout(planes, group, bits, rows, columns), tensors)
        packed = tensors[""].view(rows, planes, trit_bytes(columns))
        check_trits(packed.flatten(0, 1), columns)
        return cls(packed, columns, group, Scales.restore(tensors, "a ternary"))

    def _decode(self, rows: slice | Tensor) -> Tensor:
        packed = self.packed[rows]
        steps = self.scales.select(rows).values().view(len(packed), self.planes, -1)
        spread = places(self.group, self.columns).to(packed.device)
        total = torch.zeros(len(packed), self.columns, device=packed.device)
        for plane in range(self.planes):
            trits = unpack_trits(packed[:, plane], self.columns).float().sub_(1)
            total.add_(trits.mul_(steps[:, plane, spread]))
        return total


def ternary_layout(planes: int, group: int, scale_bits: int, rows: int, columns: int) -> Layout:
    """Suffix -> (dtype, shape) of every tensor of a ternary form of this shape."""
    trits: Layout = {"": (torch.uint8, (rows * planes * trit_bytes(columns),))}
    return trits | scales_layout(rows, planes * groups_of(group, columns), scale_bits)
