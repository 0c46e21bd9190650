"""Stored forms as the compiled kernels take them.

Integers of 2 to 8 bits (symmetric, with whole and with float zeros), trellises, codebooks and ternary planes, with fp16
and 8-bit scales, have kernels; groups must be a multiple of four columns or the whole row, which is what a kernel's
lane holds. A sum multiplies through the kernels of its parts, and a low-rank form through that of its right factor; the
left one, which is summed over the other way, is kept dense: it has ``rank`` values for a row. Factors of 16 bits are
both kept as float32, so that they are widened once and not at every product. A centred form multiplies the inputs with
its factors and hands them to its part's kernel; its offsets add one number a token. Sparse forms, of a mask and of two
in four, have kernels of their own, with 16-bit values and with codes whose groups are a multiple of 16 columns or the
whole row.
Every other form, and every form where the library is absent, multiplies through its reference (``Encoded.multiply``).

On a GPU the forms of codes but the trellis multiply by Triton's kernels (``kernels/gpu.py``), in groups of any size,
and so do the parts of sums; all else by its reference there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from layerwise.encoding.centred import Centred, moved
from layerwise.encoding.codebook import LEVELS, Codebook
from layerwise.encoding.dense import Dense
from layerwise.encoding.encoded import Encoded
from layerwise.encoding.float8 import float8_values
from layerwise.encoding.grid import FittedGrid
from layerwise.encoding.integer import GroupedInteger
from layerwise.encoding.lowrank import LowRank
from layerwise.encoding.scales import width_of
from layerwise.encoding.sparse import Sparse
from layerwise.encoding.sums import Sum
from layerwise.encoding.ternary import Ternary
from layerwise.encoding.trellis import Trellis
from layerwise.encoding.trellis_tables import OFFSET, table
from layerwise.kernels import gpu
from layerwise.kernels.gpu import TritonMatrix
from layerwise.kernels.library import chosen_path
from layerwise.kernels.matrix import Canonical, PackedMatrix, PackedTable
from layerwise.kernels.sparse import LANES, Kept, SparseMatrix

LANE = 4


class Multiplier(Protocol):
    """What a form multiplies with. ``table``: codes that are places in a table, without a product with int8.

    ``bias`` is float32 [rows] on the CPU, for float32 activations alone: the sum is then that of ``y + bias``.
    """

    table: bool

    def multiply(self, x: Tensor, *, int8: bool = False, bias: Tensor | None = None) -> Tensor: ...


class RowTable(Protocol):
    """What rows are looked up in: float32 ``[.., columns]`` at a 1-D int64 ``index``."""

    def take(self, index: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class CentredTable:
    """Rows of a centred form, from those of its part; factor and offset float32 [columns]."""

    part: RowTable
    factor: Tensor
    offset: Tensor

    def take(self, index: Tensor) -> Tensor:
        return moved(self.part.take(index), self.factor, self.offset)


@dataclass(frozen=True, eq=False)
class SumProduct:
    """``x (W_1 + W_2)^T`` by the parts' own kernels; a part that has none is multiplied by its reference."""

    parts: tuple[Multiplier | Encoded, ...]
    table = False

    def multiply(self, x: Tensor, *, int8: bool = False, bias: Tensor | None = None) -> Tensor:
        first, *others = (_part_product(part, x, int8) for part in self.parts)
        for other in others:
            first += other
        return first if bias is None else first.add_(bias)


@dataclass(frozen=True, eq=False)
class CentredProduct:
    """``(x factor) P^T + x offset``: P by its kernel; factor and offset float32 [columns]."""

    part: Multiplier
    factor: Tensor
    offset: Tensor
    table = False

    def multiply(self, x: Tensor, *, int8: bool = False, bias: Tensor | None = None) -> Tensor:
        y = self.part.multiply(x * self.factor.to(x.dtype), int8=int8)
        y += (x.float() @ self.offset)[..., None].to(y.dtype)
        return y if bias is None else y.add_(bias)


@dataclass(frozen=True, eq=False)
class LowRankProduct:
    """``(x B^T) A^T``: B by its kernel, A dense ``[rank, rows]`` float32."""

    right: Multiplier
    left: Tensor
    table = False

    def multiply(self, x: Tensor, *, int8: bool = False, bias: Tensor | None = None) -> Tensor:
        inner = self.right.multiply(x.float(), int8=int8 and not self.right.table)
        y = (inner @ self.left).to(x.dtype)
        return y if bias is None else y.add_(bias)


@dataclass(frozen=True, eq=False)
class DenseProduct:
    """``x W^T`` of values kept as float32, ``turned`` [columns, rows]."""

    turned: Tensor
    table = False

    def multiply(self, x: Tensor, *, int8: bool = False, bias: Tensor | None = None) -> Tensor:
        y = (x.float() @ self.turned).to(x.dtype)
        return y if bias is None else y.add_(bias)


def _part_product(part: Multiplier | Encoded, x: Tensor, int8: bool) -> Tensor:
    if isinstance(part, Encoded):
        return part.multiply(x)
    return part.multiply(x, int8=int8 and not part.table)


def repack(form: Encoded) -> Multiplier | None:
    """``form`` in the layout of the kernels; None where it is not theirs or there are none."""
    if isinstance(form, Sum):
        kernels = [repack(form.first), repack(form.second)]
        if kernels == [None, None]:
            return None
        return SumProduct(tuple(k or part for k, part in zip(kernels, (form.first, form.second), strict=True)))
    if isinstance(form, LowRank):
        right = _dense_factor(form.right) if isinstance(form.right, Dense) else repack(form.right)
        return None if right is None else LowRankProduct(right, form.left.decode())
    if isinstance(form, Centred):
        part = repack(form.part)
        return None if part is None else CentredProduct(part, form.factor.float(), form.offset.float())
    if isinstance(form, Sparse):
        return sparse_matrix(form)
    return triton_matrix(form) or packed_matrix(form)


def sparse_matrix(form: Sparse) -> SparseMatrix | None:
    """A sparse form for its kernel; None as for ``packed_matrix``."""
    if form.positions.device.type != "cpu" or chosen_path() is None:
        return None
    fitted = form.fitted
    if fitted is None:
        return SparseMatrix(Kept(form.mask(), form.values))
    group = fitted.grid.width(form.columns)
    if group % LANES and group < form.columns:
        return None
    codes = form.codes()
    return SparseMatrix(Kept(form.mask(), codes, fitted.grid.bits, group, fitted.steps(), fitted.floors()))


def _dense_factor(form: Dense) -> DenseProduct | None:
    """A factor of 16 bits, widened; None off the CPU, where the form multiplies itself."""
    return DenseProduct(form.decode().T.contiguous()) if form.values.device.type == "cpu" else None


def packed_matrix(form: Encoded) -> PackedMatrix | None:
    """The one matrix that a form of codes is; None for a form of several, or without kernels."""
    stored = canonical(form)
    return None if stored is None or chosen_path() is None else PackedMatrix(stored)


def triton_matrix(form: Encoded) -> TritonMatrix | None:
    """A form of codes on a GPU, for Triton's kernels; None elsewhere, without Triton, and for every other form."""
    stored = described(form)
    if stored is None or stored.codes.device.type != gpu.DEVICE:
        return None
    why = gpu.why_decoded(stored.codes.device) or ("a trellis has none there" if stored.values is not None else "")
    if why:
        gpu.warn_decoded(why)
        return None
    return TritonMatrix(stored)


def packed_table(form: Encoded) -> RowTable | None:
    """``form`` as rows to look up; None as for ``packed_matrix``."""
    if isinstance(form, Centred):
        part = packed_table(form.part)
        return None if part is None else CentredTable(part, form.factor.float(), form.offset.float())
    stored = canonical(form)
    return None if stored is None or chosen_path() is None else PackedTable(stored)


def canonical(form: Encoded) -> Canonical | None:
    """What the compiled kernels need of ``form``, or None where they have no product for it."""
    stored = described(form)
    if stored is None or stored.codes.device.type != "cpu":
        return None
    return stored if stored.group % LANE == 0 or stored.group >= stored.columns else None


def described(form: Encoded) -> Canonical | None:
    """``form`` as one matrix of codes in the order of its file; None for a form that is none."""
    if isinstance(form, GroupedInteger):
        grid = form.grid
        stored = _of_grid(form.fitted, form.packed, grid.bits)
        zero = None if form.fitted.zero is None else form.fitted.zero
        stored = Canonical(**{**vars(stored), "zero": zero, "centre": grid.middle})
    elif isinstance(form, Codebook):
        levels = torch.tensor(LEVELS[form.name])
        stored = Canonical(**{**vars(_of_grid(form.fitted, form.packed, 4)), "levels": levels})
    elif isinstance(form, Ternary):
        rows, columns = form.shape
        stored = Canonical(
            rows, columns, 2, width_of(form.group, columns), form.packed, form.scales.stored, form.scales.factor,
            centre=1, planes=form.planes, trits=True,
        )  # fmt: skip
    elif isinstance(form, Trellis):
        stored = Canonical(
            *form.shape, form.bits, width_of(form.group, form.columns), form.packed, form.scales.stored,
            form.scales.factor, centre=OFFSET, values=table(form.bits),
        )  # fmt: skip
    else:
        return None
    return stored


def _of_grid(fitted: FittedGrid, packed: torch.Tensor, bits: int) -> Canonical:
    rows, columns = packed.shape[0], fitted.columns
    scale, factor = fitted.scale, fitted.factor
    if fitted.grid.float_scale:
        assert factor is not None
        scale, factor = float8_values(scale).half(), factor.expand(rows)  # every E4M3 number is an fp16 number
    return Canonical(rows, columns, bits, fitted.grid.width(columns), packed, scale, factor)
