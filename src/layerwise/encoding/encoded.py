"""What every stored form of a weight can do.

A form is stored as a few plain tensors under the weight's own name and suffixes of it (``q_proj.weight`` holds the
codes as 1-D uint8, ``q_proj.weight_scale`` the scales), and a small JSON ``spec`` in the artifact's config.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Suffix -> (dtype, shape) of each stored tensor."""

CHUNK_ELEMENTS = 1 << 22  # rows are decoded in pieces of about this many weights


class Encoded(ABC):
    """A weight ``[rows, columns]`` in its stored form. Immutable."""

    form: ClassVar[str]
    shape: tuple[int, int]

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Suffix -> stored tensor. The suffix is ``""`` for the main tensor, else begins with an underscore."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """JSON values that, with the tensors, restore the form: ``{"form": …, "shape": [rows, columns], …}``."""

    @classmethod
    @abstractmethod
    def restore(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Encoded:
        """The inverse of ``tensors`` and ``spec``; raises ``InputError`` for anything that does not fit."""

    @abstractmethod
    def decode_rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` as a dense float32 tensor ``[stop - start, columns]``."""

    @abstractmethod
    def take_rows(self, index: Tensor) -> Tensor:
        """Dense float32 rows at a 1-D int64 ``index``: the look-up of a table. ``[len(index), columns]``."""

    def decode(self) -> Tensor:
        """The whole weight as dense float32 ``[rows, columns]``."""
        return self.decode_rows(0, self.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes that the stored tensors occupy, without the file's header."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def row_chunks(self) -> Iterator[tuple[int, int]]:
        step = max(1, CHUNK_ELEMENTS // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            yield start, min(start + step, self.shape[0])

    def multiply(self, x: Tensor) -> Tensor:
        """``x W^T`` in ``x``'s dtype, decoding a chunk of rows at a time: ``[..., columns]`` -> ``[..., rows]``."""
        parts = [x @ self.decode_rows(a, b).to(x.dtype).to(x.device).T for a, b in self.row_chunks()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class PackedRows(Encoded):
    """A form that keeps each row's codes in a row of ``packed``, so that any rows decode on their own."""

    packed: Tensor

    @abstractmethod
    def _decode(self, rows: slice | Tensor) -> Tensor:
        """Some rows as dense float32: a range, or a 1-D index that has been checked."""

    def decode_rows(self, start: int, stop: int) -> Tensor:
        return self._decode(slice(start, stop))

    def take_rows(self, index: Tensor) -> Tensor:
        check_index(index, self.shape[0])
        return self._decode(index)

    def decode(self) -> Tensor:
        whole = torch.empty(self.shape, device=self.packed.device)
        for start, stop in self.row_chunks():
            whole[start:stop] = self._decode(slice(start, stop))
        return whole


def check_index(index: Tensor, rows: int) -> None:
    """Refuse row numbers outside ``0 .. rows - 1``, which indexing would silently count from the end."""
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(f"row numbers are a 1-D int64 tensor, not {index.dtype} {list(index.shape)}")
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= rows):
        raise IndexError(f"row numbers reach from {int(index.min())} to {int(index.max())}, outside 0..{rows - 1}")


def layout_bytes(layout: Layout) -> int:
    """Bytes of all tensors of a layout."""
    total = 0
    for dtype, shape in layout.values():
        count = 1
        for side in shape:
            count *= side
        total += count * dtype.itemsize
    return total
