"""Form ``centred``: a trellis whose columns are scaled and moved.

    W'[r, c] = part[r, c] factor[c] + offset[c]

==========================  ==================  =====================================
stored tensor               type and shape      holds
==========================  ==================  =====================================
``""``, ``_part_scale``, …  as in ``trellis``   the part
``_factor``                 fp16 [columns]      what a column is multiplied with, > 0
``_offset``                 fp16 [columns]      what is added to it then
==========================  ==================  =====================================

A trellis expects numbers around zero of one size. The rows of a word table have much in common: in some columns most of
them lie far on one side, where a trellis has few values. 32 / rows bits a weight take that out.
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
from layerwise.encoding.nested import joined, joined_layout, restored
from layerwise.encoding.trellis import Trellis
from layerwise.errors import InputError

PARTS = ("part",)
PART_FORMS = (Trellis.form,)
OWN = ("_factor", "_offset")


@dataclass(frozen=True, eq=False)
class Centred(PackedRows):
    """``part`` with its columns times ``factor`` [columns] plus ``offset`` [columns], both fp16."""

    form: ClassVar[str] = "centred"
    part: Trellis
    factor: Tensor
    offset: Tensor

    @property
    def packed(self) -> Tensor:  # type: ignore[override]
        return self.part.packed

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.part.shape

    def tensors(self) -> dict[str, Tensor]:
        return joined({"part": self.part}) | {"_factor": self.factor, "_offset": self.offset}

    def spec(self) -> dict[str, Any]:
        return {"form": self.form, "layout": LAYOUT_VERSION, "shape": list(self.shape), "part": self.part.spec()}

    @classmethod
    def restore(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Centred:
        shape = stored_shape(spec)
        check_version(spec, "columns")
        check_tensors(_own_layout(shape[1]), {suffix: t for suffix, t in tensors.items() if suffix in OWN})
        (part,) = restored(spec, {suffix: t for suffix, t in tensors.items() if suffix not in OWN}, PARTS, PART_FORMS)
        assert isinstance(part, Trellis)
        if part.shape != tuple(shape):
            raise InputError(f"the part of a centred form of {list(shape)} must have its shape, not {list(part.shape)}")
        factor, offset = tensors["_factor"], tensors["_offset"]
        if not bool((torch.isfinite(factor) & (factor > 0)).all()):
            raise InputError("_factor of a centred form must be positive and finite")
        if not bool(torch.isfinite(offset).all()):
            raise InputError("_offset of a centred form must be finite")
        return cls(part, factor, offset)

    def _decode(self, rows: slice | Tensor) -> Tensor:
        return moved(self.part._decode(rows), self.factor, self.offset)

    def multiply(self, x: Tensor) -> Tensor:
        return self.part.multiply(x * self.factor.to(x)) + (x @ self.offset.to(x))[..., None]


def moved(rows: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """Decoded rows [.., columns] float32, scaled and moved in place."""
    return rows.mul_(factor.to(rows)).add_(offset.to(rows))


def centred_layout(part: Layout, columns: int) -> Layout:
    """Suffix -> (dtype, shape), from the layout of the part."""
    return joined_layout({"part": part}) | _own_layout(columns)


def _own_layout(columns: int) -> Layout:
    return dict.fromkeys(OWN, (torch.float16, (columns,)))
