"""Form ``dense``: the weight itself in fp16, bf16 or fp32, for what is not worth encoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerwise.encoding.encoded import Encoded, Layout, check_index
from layerwise.encoding.integer import check_tensors, stored_shape
from layerwise.errors import InputError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Dense(Encoded):
    """``values`` [rows, columns] as stored; decoding widens them to float32, which loses nothing."""

    form: ClassVar[str] = "dense"
    values: Tensor

    @staticmethod
    def of(weight: Tensor, dtype: torch.dtype) -> Dense:
        """Store ``weight`` as ``dtype``; raises ``InputError`` for a value that ``dtype`` cannot hold."""
        if weight.dim() != 2 or min(weight.shape) < 1:
            raise InputError(f"a dense form holds a matrix [rows, columns], not {list(weight.shape)}")
        if dtype not in NAMES:
            raise InputError(f"a dense form is stored as {', '.join(DTYPES)}, not {str(dtype).removeprefix('torch.')}")
        values = weight.detach().to(dtype, copy=True).contiguous()
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"the weight holds values that {NAMES[dtype]} cannot hold (too large, NaN or infinity)")
        return Dense(values)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.values.shape[0], self.values.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.values}

    def spec(self) -> dict[str, Any]:
        return {"form": self.form, "shape": list(self.shape), "dtype": NAMES[self.values.dtype]}

    @classmethod
    def restore(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Dense:
        rows, columns = stored_shape(spec)
        name = spec.get("dtype")
        if not isinstance(name, str) or name not in DTYPES:
            raise InputError(f"a dense form is stored as {', '.join(DTYPES)}, not {name!r}")
        check_tensors(dense_layout(rows, columns, DTYPES[name]), tensors)
        return cls(tensors[""])

    def decode_rows(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop].to(torch.float32, copy=True)

    def take_rows(self, index: Tensor) -> Tensor:
        check_index(index, self.shape[0])
        return self.values[index].float()


def dense_layout(rows: int, columns: int, dtype: torch.dtype) -> Layout:
    """Suffix -> (dtype, shape) of a dense form."""
    return {"": (dtype, (rows, columns))}
