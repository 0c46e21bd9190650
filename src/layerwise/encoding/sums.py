"""Form ``sum``: ``W = W_1 + W_2``, two stored forms of one shape: what one form cannot hold, the other adds.

The tensors are those of the parts, called ``first`` and ``second`` (see ``nested``). ``decode`` is the float32 sum of
the two decoded parts; ``multiply`` adds the two products, so that a low-rank part never becomes a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from layerwise.encoding.encoded import Encoded, Layout
from layerwise.encoding.integer import stored_shape
from layerwise.encoding.nested import joined, joined_layout, restored
from layerwise.errors import InputError


@dataclass(frozen=True, eq=False)
class Sum(Encoded):
    """Two stored forms, added. A part is never a sum itself, which bounds what a file can nest."""

    form: ClassVar[str] = "sum"
    first: Encoded
    second: Encoded

    def __post_init__(self) -> None:
        if self.first.shape != self.second.shape:
            raise InputError(
                f"the parts of a sum must have one shape: {list(self.first.shape)} and {list(self.second.shape)} differ"
            )
        if isinstance(self.first, Sum) or isinstance(self.second, Sum):
            raise InputError("a part of a sum cannot be a sum itself")

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.first.shape

    def tensors(self) -> dict[str, Tensor]:
        return joined({"first": self.first, "second": self.second})

    def spec(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "shape": list(self.shape),
            "first": self.first.spec(),
            "second": self.second.spec(),
        }

    @classmethod
    def restore(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Sum:
        from layerwise.encoding.forms import FORMS

        shape = stored_shape(spec)
        first, second = restored(spec, tensors, ("first", "second"), [name for name in FORMS if name != cls.form])
        if first.shape != shape:
            raise InputError(f"a sum of shape {list(shape)} cannot have parts of shape {list(first.shape)}")
        return cls(first, second)

    def decode_rows(self, start: int, stop: int) -> Tensor:
        return self.first.decode_rows(start, stop).add_(self.second.decode_rows(start, stop))

    def take_rows(self, index: Tensor) -> Tensor:
        return self.first.take_rows(index).add_(self.second.take_rows(index))

    def multiply(self, x: Tensor) -> Tensor:
        return self.first.multiply(x) + self.second.multiply(x)


def sum_layout(first: Layout, second: Layout) -> Layout:
    """Suffix -> (dtype, shape), from the layouts of the parts."""
    return joined_layout({"first": first, "second": second})
