"""How a pruning technique stores what it keeps: its options as values, checked without loading anything numeric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerwise.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.encoding.encoded import Encoded, Layout
    from layerwise.encoding.signed import SignedGrid


@dataclass(frozen=True)
class Storage:
    """``bits`` 16 stores kept values in ``dtype``; 1 to 8 store codes on a signed grid (``encoding.signed``)."""

    sparsity: float
    pattern: str
    bits: int
    group: int
    scale_bits: int
    dtype: str

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 and self.bits != 16:
            raise InputError(f"kept values are stored in 1 to 8 bits, or in 16 as they are, not in {self.bits}")
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise InputError(f"the pattern 2:4 removes half of the weights: sparsity is 0.5, not {self.sparsity}")

    @property
    def grid(self) -> SignedGrid | None:
        """The grid of kept values, or None where they are stored as they are."""
        from layerwise.encoding.signed import SignedGrid

        return None if self.bits == 16 else SignedGrid(self.bits, self.group, self.scale_bits)

    @property
    def positions(self) -> str:
        """The pattern's name in the stored form."""
        return "2:4" if self.pattern == "2:4" else "mask"

    def layout(self, rows: int, columns: int) -> Layout:
        import torch

        from layerwise.encoding.sparse import sparse_layout
        from layerwise.prune._masks import kept_count

        kept = kept_count(rows, columns, self.sparsity, self.pattern)
        return sparse_layout(rows, columns, self.positions, kept, self.grid or getattr(torch, self.dtype))

    def values(self, weight: Tensor, mask: Tensor) -> Encoded:
        """``weight`` [rows, columns] in 16 bits where ``mask`` is true."""
        import torch

        from layerwise.encoding.sparse import Sparse

        return Sparse.from_values(weight, mask, self.positions, getattr(torch, self.dtype))

    def rounded(self, weight: Tensor, mask: Tensor, importance: Tensor | None) -> Encoded:
        """``weight`` where ``mask`` is true: as it is, or rounded on a grid fitted with ``importance`` [columns]."""
        from layerwise.encoding.signed import fit_signed, round_signed
        from layerwise.encoding.sparse import Sparse

        if self.grid is None:
            return self.values(weight, mask)
        fitted = fit_signed(weight, mask, self.grid, importance)
        return Sparse.from_codes(round_signed(weight, fitted), mask, self.positions, fitted)
