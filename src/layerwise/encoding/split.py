"""Form ``split``: some whole columns in one form, all others in another, these times a factor per column.

    W'[:, kept] = first,    W'[:, others] = second * r^T,    r [others] > 0

=====================  ==========================  ==============================================================
stored tensor          type and shape              holds
=====================  ==========================  ==============================================================
``""``, ``_first_…``   as in the form of the part  the kept columns, side by side: [rows, kept]
``_second``, …         as in the form of the part  the other columns, side by side: [rows, others]
``_mask``              uint8 [ceil(n / 8)]         one bit a column, set where it is kept
``_factor``            fp16 [others]               r, absent where the spec says ``factors: false``
=====================  ==========================  ==============================================================

One bit a *column* says which they are: 1 / rows bits a weight, where a mask of entries takes one. A rank-one factor
``r1 r2^T`` costs 16 / rows: r1 is part of what the second form stores for its rows, r2 is ``_factor``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerwise.encoding.bitplanes import LAYOUT_VERSION, pack, row_bytes, unpack
from layerwise.encoding.encoded import Encoded, Layout, check_index
from layerwise.encoding.integer import check_tensors, check_version, stored_shape
from layerwise.encoding.nested import joined, joined_layout, restored
from layerwise.errors import InputError

PART_FORMS = ("integer", "codebook", "ternary", "binary")
PARTS = ("first", "second")
OWN = ("_mask", "_factor")


@dataclass(frozen=True, eq=False)
class Split(Encoded):
    """``first`` at the columns where ``mask`` [n] bool is set, ``second`` times ``factor`` at the others."""

    form: ClassVar[str] = "split"
    first: Encoded
    second: Encoded
    mask: Tensor
    factor: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.first.shape[0], self.mask.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        own = {"_mask": pack(self.mask[None].to(torch.uint8), 1)[0]}
        if self.factor is not None:
            own["_factor"] = self.factor
        return joined({"first": self.first, "second": self.second}) | own

    def spec(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "layout": LAYOUT_VERSION,
            "shape": list(self.shape),
            "factors": self.factor is not None,
            "first": self.first.spec(),
            "second": self.second.spec(),
        }

    @classmethod
    def restore(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Split:
        rows, columns = stored_shape(spec)
        check_version(spec, "columns")
        factors = spec.get("factors")
        if not isinstance(factors, bool):
            raise InputError(f"factors of a split form is true or false, not {factors!r}")
        own = {suffix: tensor for suffix, tensor in tensors.items() if suffix in OWN}
        parts = {suffix: tensor for suffix, tensor in tensors.items() if suffix not in OWN}
        first, second = restored(spec, parts, PARTS, PART_FORMS)
        kept, others = first.shape[1], second.shape[1]
        if first.shape[0] != rows or second.shape[0] != rows or kept + others != columns:
            raise InputError(
                f"the parts of a split form of {[rows, columns]} must share its rows and its columns, "
                f"not be {list(first.shape)} and {list(second.shape)}"
            )
        check_tensors(_own_layout(columns, others, factors), own)
        mask = unpack(own["_mask"][None], columns, 1)[0].bool()
        if int(mask.sum()) != kept:
            raise InputError(f"_mask of a split form must name {kept} columns, not {int(mask.sum())}")
        factor = own.get("_factor")
        if factor is not None and not bool((torch.isfinite(factor) & (factor > 0)).all()):
            raise InputError("_factor of a split form must be positive and finite")
        return cls(first, second, mask, factor)

    def decode_rows(self, start: int, stop: int) -> Tensor:
        return self._together(self.first.decode_rows(start, stop), self.second.decode_rows(start, stop))

    def take_rows(self, index: Tensor) -> Tensor:
        check_index(index, self.shape[0])
        return self._together(self.first.take_rows(index), self.second.take_rows(index))

    def multiply(self, x: Tensor) -> Tensor:
        kept, others = (places.to(x.device) for places in self._places)
        rest = x[..., others]
        if self.factor is not None:
            rest = rest * self.factor.to(x.dtype).to(x.device)
        return self.first.multiply(x[..., kept]) + self.second.multiply(rest)

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        return self.mask.nonzero()[:, 0], (~self.mask).nonzero()[:, 0]

    def _together(self, first: Tensor, second: Tensor) -> Tensor:
        kept, others = (places.to(first.device) for places in self._places)
        whole = torch.empty(len(first), self.shape[1], device=first.device)
        whole[:, kept] = first
        whole[:, others] = second if self.factor is None else second.mul_(self.factor.float())
        return whole


def split_layout(first: Layout, second: Layout, columns: int, others: int, factors: bool) -> Layout:
    """Suffix -> (dtype, shape), from the layouts of the parts."""
    return joined_layout({"first": first, "second": second}) | _own_layout(columns, others, factors)


def _own_layout(columns: int, others: int, factors: bool) -> Layout:
    mask: Layout = {"_mask": (torch.uint8, (row_bytes(columns, 1),))}
    return mask | ({"_factor": (torch.float16, (others,))} if factors else {})
