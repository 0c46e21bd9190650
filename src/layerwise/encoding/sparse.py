"""Form ``sparse``: the positions of the kept entries and their values in row order.

=================  =============================================  ===============================================
stored tensor      type and shape                                 holds
=================  =============================================  ===============================================
``""``             uint8 [rows * position_bytes]                  which entries are kept, see ``positions``
``_values``        fp16 or bf16 [kept]                            the kept entries, row after row; or
``_values``        uint8 [row_bytes(kept, bits)]                  their codes, packed as one run of ``kept`` codes
``_scale``, …                                                     with codes: see ``signed``
=================  =============================================  ===============================================

``kept`` counts the entries of the whole matrix and is part of the description, so that the bytes follow from the shape
and the options while rows may keep different numbers. Where a row's values begin follows from the positions and is
counted once on loading. The values of a row need not begin on a whole byte: the planes of the run are cut anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerwise.encoding.bitplanes import LAYOUT_VERSION, pack, plane_widths, row_bytes, unpack
from layerwise.encoding.dense import DTYPES, NAMES
from layerwise.encoding.encoded import Encoded, Layout, check_index
from layerwise.encoding.grid import row_pieces
from layerwise.encoding.integer import check_steps, check_tensors, check_version, stored_shape
from layerwise.encoding.positions import (
    PATTERNS,
    kept_of_fours,
    pack_positions,
    position_bytes,
    unpack_positions,
)
from layerwise.encoding.signed import FittedSigned, SignedGrid, signed_layout, signed_points
from layerwise.errors import InputError

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Sparse(Encoded):
    """Positions [rows, position_bytes] uint8, values [kept] 16-bit or packed codes, and the codes' grid or None."""

    form: ClassVar[str] = "sparse"
    columns: int
    pattern: str
    kept: int
    positions: Tensor
    values: Tensor
    fitted: FittedSigned | None

    @staticmethod
    def from_values(weight: Tensor, mask: Tensor, pattern: str, dtype: torch.dtype) -> Sparse:
        """Keep the entries of ``weight`` [rows, columns] where ``mask`` is true, in 16 bits."""
        values = weight.detach()[mask].to(dtype)
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"the weight holds values that {NAMES[dtype]} cannot hold (too large, NaN or infinity)")
        return Sparse(weight.shape[1], pattern, values.numel(), pack_positions(mask, pattern), values, None)

    @staticmethod
    def from_codes(codes: Tensor, mask: Tensor, pattern: str, fitted: FittedSigned) -> Sparse:
        """Keep the codes [rows, columns] uint8 where ``mask`` is true."""
        run = codes[mask]
        packed = pack(run[None], fitted.grid.bits)[0]
        return Sparse(codes.shape[1], pattern, run.numel(), pack_positions(mask, pattern), packed, fitted)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.positions.shape[0], self.columns

    def mask(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Which entries are kept, bool [rows, columns]."""
        return unpack_positions(self.positions[rows], self.columns, self.pattern)

    @cached_property
    def starts(self) -> Tensor:
        """Where each row's values begin, and the end: int64 [rows + 1]."""
        counts = [self.mask(piece).sum(1) for piece in row_pieces(*self.shape)]
        return torch.cat([torch.zeros(1, dtype=torch.int64, device=self.positions.device), *counts]).cumsum(0)

    def tensors(self) -> dict[str, Tensor]:
        grid = {} if self.fitted is None else self.fitted.tensors()
        return {"": self.positions.reshape(-1), "_values": self.values, **grid}

    def spec(self) -> dict[str, Any]:
        common = {
            "form": self.form,
            "layout": LAYOUT_VERSION,
            "shape": list(self.shape),
            "pattern": self.pattern,
            "kept": self.kept,
        }
        if self.fitted is None:
            return common | {"dtype": NAMES[self.values.dtype]}
        grid = self.fitted.grid
        return common | {"bits": grid.bits, "group": grid.group, "scale_bits": grid.scale_bits}

    @classmethod
    def restore(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Sparse:
        rows, columns = stored_shape(spec)
        check_version(spec, "values")
        pattern, kept = spec.get("pattern"), spec.get("kept")
        if not isinstance(pattern, str) or pattern not in PATTERNS:
            raise InputError(f"the pattern of a sparse form is one of {', '.join(PATTERNS)}, not {pattern!r}")
        if type(kept) is not int or not 0 <= kept <= rows * columns:
            raise InputError(f"a sparse form of {rows} x {columns} keeps 0 to {rows * columns} entries, not {kept!r}")
        kind = _kind(spec)
        check_tensors(sparse_layout(rows, columns, pattern, kept, kind), tensors)
        positions, values = tensors[""].view(rows, position_bytes(columns, pattern)), tensors["_values"]
        fitted = None
        if isinstance(kind, SignedGrid):
            scale, factor = tensors["_scale"], tensors.get("_scale_factor")
            check_steps(tensors, "a sparse form")
            fitted = FittedSigned(kind, columns, scale, factor, tensors.get("_floor"))
        elif not bool(torch.isfinite(values).all()):
            raise InputError("_values of a sparse form must be finite")
        form = cls(columns, pattern, kept, positions, values, fitted)
        form._check_positions()
        return form

    def _check_positions(self) -> None:
        """Refuse positions that do not keep ``kept`` entries, or are not written the one way there is."""
        if int(self.starts[-1]) != self.kept:
            raise InputError(f"the positions of a sparse form keep {int(self.starts[-1])} entries, not {self.kept}")
        for piece in row_pieces(*self.shape):
            mask = self.mask(piece)
            if self.pattern == "2:4" and not bool((mask.sum(1) == kept_of_fours(self.columns)).all()):
                raise InputError("the positions of a 2:4 form do not keep two of every four columns")
            if not torch.equal(pack_positions(mask, self.pattern), self.positions[piece]):
                raise InputError("the positions of a sparse form have bits set that belong to no column")

    def decode_rows(self, start: int, stop: int) -> Tensor:
        rows = slice(start, stop)
        mask = self.mask(rows)
        first, last = int(self.starts[start]), int(self.starts[stop])
        if self.fitted is None:
            return self._placed(mask, self.values[first:last])
        return signed_points(self._run(first, last), mask, self.fitted.select(rows))

    def take_rows(self, index: Tensor) -> Tensor:
        check_index(index, self.shape[0])
        mask, begin = self.mask(index), self.starts[index]
        counts = self.starts[index + 1] - begin
        before = counts.cumsum(0) - counts  # of this row's first value among those gathered
        places = torch.arange(int(counts.sum()), device=index.device) + (begin - before).repeat_interleave(counts)
        if self.fitted is None:
            return self._placed(mask, self.values[places])
        return signed_points(self._gathered(places), mask, self.fitted.select(index))

    def decode(self) -> Tensor:
        whole = torch.empty(self.shape, device=self.positions.device)
        for start, stop in self.row_chunks():
            whole[start:stop] = self.decode_rows(start, stop)
        return whole

    def codes(self) -> Tensor:
        """The codes of the kept entries, row after row: uint8 [kept]."""
        return self._run(0, self.kept)

    def _placed(self, mask: Tensor, values: Tensor) -> Tensor:
        return torch.zeros(mask.shape, device=mask.device).masked_scatter_(mask, values.float())

    def _run(self, first: int, last: int) -> Tensor:
        """Codes ``first:last``, uint8: the bytes of each plane that hold them, unpacked as a run of their own."""
        assert self.fitted is not None
        bits, begin = self.fitted.grid.bits, first // 8 * 8  # eight codes fill whole bytes of every plane
        parts, at = [], 0
        for width in plane_widths(bits):
            parts.append(self.values[at + begin * width // 8 : at + -(-last * width // 8)])
            at += -(-self.kept * width // 8)
        return unpack(torch.cat(parts)[None], last - begin, bits)[0, first - begin :]

    def _gathered(self, places: Tensor) -> Tensor:
        """The codes at ``places`` int64 [k], uint8."""
        assert self.fitted is not None
        codes = torch.zeros(len(places), dtype=torch.uint8, device=places.device)
        at = shift = 0
        for width in plane_widths(self.fitted.grid.bits):
            bit = places * width
            plane = self.values[at + bit // 8] >> (bit % 8).to(torch.uint8)
            codes |= (plane & (2**width - 1)) << shift
            at += -(-self.kept * width // 8)
            shift += width
        return codes


def sparse_layout(rows: int, columns: int, pattern: str, kept: int, values: SignedGrid | torch.dtype) -> Layout:
    """Suffix -> (dtype, shape) of a sparse form that keeps ``kept`` entries as codes of a grid or in 16 bits."""
    layout: Layout = {"": (torch.uint8, (rows * position_bytes(columns, pattern),))}
    if not isinstance(values, SignedGrid):
        return layout | {"_values": (values, (kept,))}
    codes: Layout = {"_values": (torch.uint8, (row_bytes(kept, values.bits),))}
    return layout | codes | signed_layout(values, rows, columns)


def _kind(spec: Mapping[str, Any]) -> SignedGrid | torch.dtype:
    """How the values are stored, from the description."""
    if "dtype" in spec:
        name = spec["dtype"]
        if not isinstance(name, str) or DTYPES.get(name) not in HALVES:
            raise InputError(f"the values of a sparse form are float16 or bfloat16, not {name!r}")
        return DTYPES[name]
    missing = [name for name in ("bits", "group", "scale_bits") if name not in spec]
    if missing:
        raise InputError(f"the description of a sparse form lacks dtype or {', '.join(missing)}")
    return SignedGrid(spec["bits"], spec["group"], spec["scale_bits"])
