"""Form ``mixed``: group-wise integers in which every group of columns has its own width of 1 to 8 bits.

=============  ==================================  ==============================================================
stored tensor  type and shape                      holds
=============  ==================================  ==============================================================
``""``         uint8 [rows * ceil(n_bits / 8)]     codes of a row as one run of bits, see below
``_scale``     fp16 [rows, groups]                 steps
``_zero``      uint8 [rows * ceil(z_bits / 8)]     zeros, one a group, each as wide as the group's codes
``_bits``      uint8 [ceil(groups / 2)]            width of every group, two to a byte, the first in the low half
``_first``     uint8 [ceil(columns / 8)]           only with ``first`` > 0: one bit a column, set for ``first`` of them
=============  ==================================  ==============================================================

**Groups.** Without ``first`` they are runs of ``group`` consecutive columns, the last one short if it must be. With it
the columns whose bit is set come first, in their order, then the others; each part is cut into groups for itself.

**Runs of bits.** A row is its groups one after another; a group of w columns and b bits is b runs of w bits, the lowest
bits of its codes first. Nothing is padded but the end of the row, so the bytes of a row depend on the sum of the widths
alone: ``n_bits = sum_g w_g b_g``, ``z_bits = sum_g b_g``. Where groups are multiples of 8 columns every run is whole
bytes, and a kernel reads a group as so many bit planes.

``weight = (code - zero) * step`` in float32. With one bit the zero counts in halves: 1 is the pair -step/2, step/2,
and 0 the pair 0, step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerwise.encoding.bitplanes import LAYOUT_VERSION, pack, row_bytes, unpack
from layerwise.encoding.encoded import Layout, PackedRows
from layerwise.encoding.grid import row_pieces
from layerwise.encoding.integer import check_steps, check_tensors, check_version, stored_shape
from layerwise.errors import InputError


@dataclass(frozen=True, eq=False)
class Groups:
    """How the columns are cut, and how wide each group's codes are.

    size:  columns of a full group (0 = all of its part). bits: int64 [groups]. first: bool [columns], or None.
    """

    columns: int
    size: int
    bits: Tensor
    first: Tensor | None = None

    @cached_property
    def order(self) -> Tensor:
        """The columns as they are stored: int64 [columns]."""
        if self.first is None:
            return torch.arange(self.columns)
        return torch.cat([self.first.nonzero()[:, 0], (~self.first).nonzero()[:, 0]])

    @cached_property
    def widths(self) -> list[int]:
        """Columns of every group."""
        return group_widths(self.columns, self.size, 0 if self.first is None else int(self.first.sum()))

    @cached_property
    def of(self) -> Tensor:
        """The group of every stored column: int64 [columns]."""
        return torch.repeat_interleave(torch.arange(len(self.widths)), torch.tensor(self.widths))


@dataclass(frozen=True, eq=False)
class Mixed(PackedRows):
    """packed, zero: uint8 [rows, bytes of a row]; scale: fp16 [rows, groups]."""

    form: ClassVar[str] = "mixed"
    packed: Tensor
    zero: Tensor
    scale: Tensor
    groups: Groups

    @staticmethod
    def from_codes(codes: Tensor, scale: Tensor, zero: Tensor, groups: Groups) -> Mixed:
        """codes [rows, columns] uint8 in the stored order of the columns; scale fp16 and zero uint8 [rows, groups]."""
        return Mixed(
            pack_runs(codes, groups.widths, groups.bits), pack_runs(zero, [1] * len(groups.bits), groups.bits),
            scale, groups,
        )  # fmt: skip

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.packed.shape[0], self.groups.columns

    def codes(self) -> Tensor:
        """All codes in the stored order of the columns: uint8 [rows, columns]."""
        return unpack_runs(self.packed, self.groups.widths, self.groups.bits)

    def tensors(self) -> dict[str, Tensor]:
        stored = {
            "": self.packed.reshape(-1),
            "_scale": self.scale,
            "_zero": self.zero.reshape(-1),
            "_bits": pack(self.groups.bits.to(torch.uint8)[None], 4)[0],
        }
        if self.groups.first is not None:
            stored["_first"] = pack(self.groups.first.to(torch.uint8)[None], 1)[0]
        return stored

    def spec(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "layout": LAYOUT_VERSION,
            "shape": list(self.shape),
            "group": self.groups.size,
            "first": 0 if self.groups.first is None else int(self.groups.first.sum()),
        }

    @classmethod
    def restore(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Mixed:
        rows, columns = stored_shape(spec)
        check_version(spec, "codes")
        size, first = spec.get("group"), spec.get("first")
        if type(size) is not int or size < 0 or type(first) is not int or not 0 <= first < columns:
            raise InputError(f"group and first of a mixed form are whole numbers, first below {columns}")
        if size > columns:
            raise InputError(f"a group of a mixed form has at most its {columns} columns, not {size}")
        count = sum(-(-part // (size or part)) for part in (first, columns - first) if part)
        tags: Layout = {"_bits": (torch.uint8, (row_bytes(count, 4),))}  # before anything is as long as a spec says
        if first:
            tags["_first"] = (torch.uint8, (row_bytes(columns, 1),))
        check_tensors(tags, {suffix: t for suffix, t in tensors.items() if suffix in ("_bits", "_first")})
        bits = _unpacked("_bits", tensors, count, 4).long()
        if bool(((bits < 1) | (bits > 8)).any()):
            raise InputError("a group of a mixed form has 1 to 8 bits")
        mask = None
        if first:
            mask = _unpacked("_first", tensors, columns, 1).bool()
            if int(mask.sum()) != first:
                raise InputError(f"_first of a mixed form must name {first} columns, not {int(mask.sum())}")
        check_tensors(mixed_layout(rows, columns, size, first, bits.tolist()), tensors)
        check_steps(tensors, "a mixed form")
        groups = Groups(columns, size, bits, mask)
        return cls(tensors[""].view(rows, -1), tensors["_zero"].view(rows, -1), tensors["_scale"], groups)

    def _decode(self, rows: slice | Tensor) -> Tensor:
        groups, device = self.groups, self.packed.device
        codes = unpack_runs(self.packed[rows], groups.widths, groups.bits)
        zeros = unpack_runs(self.zero[rows], [1] * len(groups.bits), groups.bits)
        stored = mixed_points(codes, self.scale[rows], zeros, groups)
        return torch.empty_like(stored).index_copy_(1, groups.order.to(device), stored)


def mixed_points(codes: Tensor, scale: Tensor, zero: Tensor, groups: Groups) -> Tensor:
    """The values that codes stand for, columns in their stored order: float32 [rows, columns]."""
    of = groups.of.to(codes.device)
    return codes.float().sub_(real_zeros(zero, groups)[:, of]).mul_(scale.float()[:, of])


def real_zeros(zero: Tensor, groups: Groups) -> Tensor:
    """Zeros as the levels that they stand for, halves with one bit: float32 [rows, groups]."""
    return zero.float() * torch.where(groups.bits == 1, 0.5, 1.0).to(zero.device)


def mixed_layout(rows: int, columns: int, size: int, first: int, bits: Sequence[int]) -> Layout:
    """Suffix -> (dtype, shape) of a mixed form; ``first`` columns are named, 0 for none."""
    widths = group_widths(columns, size, first)
    code_bits = sum(w * b for w, b in zip(widths, bits, strict=True))
    layout: Layout = {
        "": (torch.uint8, (rows * -(-code_bits // 8),)),
        "_scale": (torch.float16, (rows, len(widths))),
        "_zero": (torch.uint8, (rows * -(-sum(bits) // 8),)),
        "_bits": (torch.uint8, (row_bytes(len(widths), 4),)),
    }
    return layout | ({"_first": (torch.uint8, (row_bytes(columns, 1),))} if first else {})


def group_widths(columns: int, size: int, first: int) -> list[int]:
    """Columns of every group: of the ``first`` columns, then of the others."""
    widths: list[int] = []
    for part in (first, columns - first):
        full = min(size or part, part)
        widths += [full] * (part // full) + [part % full] * bool(part % full) if part else []
    return widths


def pack_runs(codes: Tensor, widths: Sequence[int], bits: Tensor) -> Tensor:
    """``codes`` [rows, sum(widths)] uint8, those of a group below ``2**bits``  ->  [rows, bytes] uint8."""
    column, plane = _places(widths, bits)
    packed = []
    for rows in row_pieces(codes.shape[0], 8 * codes.shape[1]):
        packed.append(pack(codes[rows][:, column] >> plane & 1, 1))
    return torch.cat(packed)


def unpack_runs(packed: Tensor, widths: Sequence[int], bits: Tensor) -> Tensor:
    """The inverse of ``pack_runs``: codes [rows, sum(widths)] uint8."""
    column, plane = (t.to(packed.device) for t in _places(widths, bits))
    single = unpack(packed, len(column), 1)
    codes = torch.zeros(packed.shape[0], sum(widths), dtype=torch.uint8, device=packed.device)
    for place in range(int(bits.max())):
        at = (plane == place).nonzero()[:, 0]
        codes[:, column[at]] |= single[:, at] << place
    return codes


def _places(widths: Sequence[int], bits: Tensor) -> tuple[Tensor, Tensor]:
    """Of every bit of a row: its column int64 and its place in the code uint8."""
    columns, planes, start = [], [], 0
    for width, count in zip(widths, bits.tolist(), strict=True):
        columns.append(torch.arange(start, start + width).repeat(count))
        planes.append(torch.arange(count, dtype=torch.uint8).repeat_interleave(width))
        start += width
    return torch.cat(columns), torch.cat(planes)


def _unpacked(suffix: str, tensors: Mapping[str, Tensor], count: int, bits: int) -> Tensor:
    """One row of small numbers, whose unused bits must be zero."""
    found = unpack(tensors[suffix][None], count, bits)
    if not bool((pack(found, bits)[0] == tensors[suffix]).all()):
        raise InputError(f"{suffix} of a mixed form goes on behind its end")
    return found[0]
