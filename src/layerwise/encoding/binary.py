"""Form ``binary``: one bit a weight, times a scale per group, around a mean per row.

    W'_ij = mu_i + a_ig s_ij,    s_ij in {-1, 1}

=================  ==============================  ==========================================================
stored tensor      type and shape                  holds
=================  ==============================  ==========================================================
``""``             uint8 [rows * ceil(n / 8)]      one bit a column, set where s = 1; see ``bitplanes``
``_scale``         fp16 or uint8 [rows, groups]    scales, or their codes
``_scale_factor``  fp16 [rows]                     only with 8-bit scales: scale = code * factor
``_mean``          fp16 [rows]                     mu, only where ``centred``
=================  ==============================  ==========================================================

``decode`` is ``s * a + mu`` in float32, product and sum rounded one after the other. bits per weight = 1 + 16 / g
+ 16 / n, the last only where centred; with 8-bit scales 1 + 8 / g and 16 / n more for the factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerwise.encoding.bitplanes import LAYOUT_VERSION, pack, row_bytes, unpack
from layerwise.encoding.encoded import Layout, PackedRows
from layerwise.encoding.integer import check_tensors, check_version, stored_shape
from layerwise.encoding.scales import Scales, check_group, groups_of, places, scales_layout
from layerwise.errors import InputError


@dataclass(frozen=True, eq=False)
class Binary(PackedRows):
    """Packed signs ``[rows, row_bytes]`` uint8, the scales of their groups, and the rows' means or None."""

    form: ClassVar[str] = "binary"
    packed: Tensor
    columns: int
    group: int
    scales: Scales
    mean: Tensor | None

    @staticmethod
    def from_codes(codes: Tensor, group: int, scales: Scales, mean: Tensor | None) -> Binary:
        """Pack ``codes`` [rows, columns] uint8, 0 or 1 for -1 and 1; ``mean`` [rows] fp16."""
        return Binary(pack(codes, 1), codes.shape[1], group, scales, mean)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.packed.shape[0], self.columns

    def codes(self) -> Tensor:
        """All codes, unpacked: uint8 [rows, columns]."""
        return unpack(self.packed, self.columns, 1)

    def tensors(self) -> dict[str, Tensor]:
        stored = {"": self.packed.reshape(-1), **self.scales.tensors()}
        return stored if self.mean is None else {**stored, "_mean": self.mean}

    def spec(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "layout": LAYOUT_VERSION,
            "shape": list(self.shape),
            "group": self.group,
            "scale_bits": self.scales.bits,
            "centred": self.mean is not None,
        }

    @classmethod
    def restore(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Binary:
        rows, columns = stored_shape(spec)
        check_version(spec, "signs")
        centred = spec.get("centred")
        if not isinstance(centred, bool):
            raise InputError(f"centred of a binary form is true or false, not {centred!r}")
        group, bits = check_group(spec.get("group"), spec.get("scale_bits"))
        check_tensors(binary_layout(group, bits, centred, rows, columns), tensors)
        mean = tensors.get("_mean")
        if mean is not None and not bool(torch.isfinite(mean).all()):
            raise InputError("_mean of a binary form must be finite")
        packed = tensors[""].view(rows, row_bytes(columns, 1))
        return cls(packed, columns, group, Scales.restore(tensors, "a binary"), mean)

    def _decode(self, rows: slice | Tensor) -> Tensor:
        signs = unpack(self.packed[rows], self.columns, 1).float().mul_(2).sub_(1)
        spread = places(self.group, self.columns).to(signs.device)
        values = signs.mul_(self.scales.select(rows).values()[:, spread])
        return values if self.mean is None else values.add_(self.mean[rows].float()[:, None])


def binary_layout(group: int, scale_bits: int, centred: bool, rows: int, columns: int) -> Layout:
    """Suffix -> (dtype, shape) of every tensor of a binary form of this shape."""
    signs: Layout = {"": (torch.uint8, (rows * row_bytes(columns, 1),))}
    means: Layout = {"_mean": (torch.float16, (rows,))} if centred else {}
    return signs | scales_layout(rows, groups_of(group, columns), scale_bits) | means
