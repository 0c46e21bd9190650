"""Form ``lowrank``: ``W = sum_k a_k b_k``, a column times a row, k = 0 .. rank - 1.

The columns a_k are the rows of ``left`` [rank, rows] (A transposed) and the rows b_k those of ``right`` [rank,
columns], so that in both factors a group of values that share a scale belongs to one k: few values to a row, as A
itself would have them, would spend more on scales than on codes. Each factor has a form of its own.

=====================  ==============================================================================
stored tensor          holds
=====================  ==============================================================================
``""``                 main tensor of ``left`` as 1-D uint8: packed codes, or a dense factor's bytes
``_left_…``            the other tensors of its form
``_right``             main tensor of ``right``, in its own type and shape
``_right_…``           the other tensors of its form
=====================  ==============================================================================

``decode`` adds ``a_k b_k`` for k = 0, 1, … in float32, product and sum rounded separately: an entry depends on its own
row and column alone, and is the same on every machine, however many rows are asked for. ``multiply`` uses the two
products ``(x B^T) A^T``, which cost ``rank (rows + columns)`` a vector in place of ``rows columns``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerwise.encoding.encoded import Encoded, Layout, check_index
from layerwise.encoding.integer import stored_shape
from layerwise.encoding.nested import joined, joined_layout, restored
from layerwise.errors import InputError

FACTOR_FORMS = ("dense", "integer", "codebook")
PIECE = 1 << 16  # entries of the product that are summed at once: they stay in the processor's cache


@dataclass(frozen=True, eq=False)
class LowRank(Encoded):
    """The product of two stored factors: ``left`` [rank, rows] transposed, times ``right`` [rank, columns]."""

    form: ClassVar[str] = "lowrank"
    left: Encoded
    right: Encoded

    def __post_init__(self) -> None:
        if self.left.shape[0] != self.right.shape[0]:
            raise InputError(
                f"the factors of a low-rank form must share their rank: {list(self.left.shape)} and "
                f"{list(self.right.shape)} do not"
            )

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.left.shape[1], self.right.shape[1]

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        return joined({"left": self.left, "right": self.right})

    def spec(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "shape": list(self.shape),
            "rank": self.rank,
            "left": self.left.spec(),
            "right": self.right.spec(),
        }

    @classmethod
    def restore(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LowRank:
        rows, columns = stored_shape(spec)
        rank = spec.get("rank")
        if type(rank) is not int or rank < 1:
            raise InputError(f"the rank of a low-rank form must be a positive whole number, not {rank!r}")
        left, right = restored(spec, tensors, ("left", "right"), FACTOR_FORMS)
        if left.shape != (rank, rows) or right.shape != (rank, columns):
            raise InputError(
                f"a low-rank form of {[rows, columns]} and rank {rank} has factors {[rank, rows]} and "
                f"{[rank, columns]}, not {list(left.shape)} and {list(right.shape)}"
            )
        return cls(left, right)

    def decode_rows(self, start: int, stop: int) -> Tensor:
        return product(self.left.decode()[:, start:stop], self.right.decode())

    def take_rows(self, index: Tensor) -> Tensor:
        check_index(index, self.shape[0])
        return product(self.left.decode()[:, index], self.right.decode())

    def decode(self) -> Tensor:
        return product(self.left.decode(), self.right.decode())

    def multiply(self, x: Tensor) -> Tensor:
        return self.right.multiply(x) @ self.left.decode().to(x.dtype).to(x.device)


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left^T right`` of [r, m] and [r, n] in float32, summed in the order of r: [m, n]."""
    rows, columns = left.shape[1], right.shape[1]
    whole = torch.zeros(rows, columns, device=left.device)
    step = max(1, PIECE // columns)
    for start in range(0, rows, step):
        part, factors = whole[start : start + step], left[:, start : start + step]
        term = torch.empty_like(part)
        for k in range(right.shape[0]):
            torch.mul(factors[k, :, None], right[k], out=term)
            part.add_(term)
    return whole


def lowrank_layout(left: Layout, right: Layout) -> Layout:
    """Suffix -> (dtype, shape), from the layouts of the factors."""
    return joined_layout({"left": left, "right": right})
