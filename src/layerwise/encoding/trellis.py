"""Form ``trellis``: codes of 1 to 5 bits whose values depend on the codes before them.

    W'[r, c] = s[r, g] table[state],    state = (q0 + q1 2^k + q2 2^2k + ...) mod 256,    g the group of c

``q0`` is the code of k bits at (r, c), ``q1, q2, ...`` those of the rows above it in the same column. Rows stand in
strips of 32, and in a strip the last row is above the first: every strip is a ring that decodes by itself. So a code of
k bits chooses among ``2^k`` of 256 values, and which ones they are was chosen by the codes before: for normally
distributed weights that is worth a quarter to nearly half a bit a weight over even steps of as many codes, and costs
nothing to store (``trellis_tables`` has the tables and what they are worth). Rows that the last strip lacks have
code 0.

=================  =========================================  =================================================
stored tensor      type and shape                             holds
=================  =========================================  =================================================
``""``             uint8 [rows * row_bytes(columns, bits)]    packed codes, see ``bitplanes``
``_scale``         fp16 or uint8 [rows, groups]               scales, or their codes, see ``scales``
``_scale_factor``  fp16 [rows]                                only with 8-bit scales: scale = code * factor
=================  =========================================  =================================================

``decode`` is ``table * scale`` in float32, the table holding whole numbers from -128 to 127.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerwise.encoding.bitplanes import LAYOUT_VERSION, pack, row_bytes, unpack
from layerwise.encoding.encoded import Layout, PackedRows
from layerwise.encoding.integer import check_tensors, check_version, stored_shape
from layerwise.encoding.scales import Scales, check_group, groups_of, places, scales_layout
from layerwise.encoding.trellis_tables import MOST_BITS, STATES, TABLE_VERSION, table
from layerwise.errors import InputError

STRIP = 32  # rows


@dataclass(frozen=True, eq=False)
class Trellis(PackedRows):
    """Packed codes ``[rows, row_bytes]`` uint8 and the scales ``[rows, groups]`` of their groups."""

    form: ClassVar[str] = "trellis"
    packed: Tensor
    columns: int
    bits: int
    group: int
    scales: Scales

    @staticmethod
    def from_codes(codes: Tensor, bits: int, group: int, scales: Scales) -> Trellis:
        """Pack ``codes`` [rows, columns] uint8, each below ``2**bits``."""
        return Trellis(pack(codes, bits), codes.shape[1], bits, group, scales)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.packed.shape[0], self.columns

    def codes(self) -> Tensor:
        """All codes, unpacked: uint8 [rows, columns]."""
        return unpack(self.packed, self.columns, self.bits)

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.packed.reshape(-1), **self.scales.tensors()}

    def spec(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "layout": LAYOUT_VERSION,
            "table": TABLE_VERSION,
            "shape": list(self.shape),
            "bits": self.bits,
            "group": self.group,
            "scale_bits": self.scales.bits,
        }

    @classmethod
    def restore(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Trellis:
        rows, columns = stored_shape(spec)
        check_version(spec, "codes")
        version, bits = spec.get("table"), spec.get("bits")
        if type(version) is not int or version != TABLE_VERSION:
            raise InputError(f"the table of a trellis is version {version!r}; this version reads {TABLE_VERSION}")
        if type(bits) is not int or not 1 <= bits <= MOST_BITS:
            raise InputError(f"the codes of a trellis have 1 to {MOST_BITS} bits, not {bits!r}")
        group, scale_bits = check_group(spec.get("group"), spec.get("scale_bits"))
        check_tensors(trellis_layout(bits, group, scale_bits, rows, columns), tensors)
        packed = tensors[""].view(rows, row_bytes(columns, bits))
        return cls(packed, columns, bits, group, Scales.restore(tensors, "a trellis"))

    def _decode(self, rows: slice | Tensor) -> Tensor:
        states = self._range(rows) if isinstance(rows, slice) else self._some(rows)
        values = table(self.bits).to(states.device).float()[states.int()]
        return values.mul_(self.scales.select(rows).values()[:, places(self.group, self.columns).to(states.device)])

    def _range(self, rows: slice) -> Tensor:
        """States of a range of rows, from whole strips."""
        start, stop, _ = rows.indices(self.packed.shape[0])
        first = start // STRIP * STRIP
        codes = unpack(self.packed[first : -(-stop // STRIP) * STRIP], self.columns, self.bits)
        return states_of(codes, self.bits)[start - first : stop - first]

    def _some(self, index: Tensor) -> Tensor:
        """States of single rows, from the few above each."""
        count, first = self.packed.shape[0], index // STRIP * STRIP
        state = torch.zeros(len(index), self.columns, dtype=torch.int16, device=index.device)
        for back in range(-(-8 // self.bits)):
            above = first + (index - first - back) % STRIP
            codes = unpack(self.packed[above.clamp(max=count - 1)], self.columns, self.bits).to(torch.int16)
            state |= torch.where((above < count)[:, None], codes, 0) << back * self.bits
        return (state & STATES - 1).to(torch.uint8)


def states_of(codes: Tensor, bits: int) -> Tensor:
    """The state of every code: ``codes`` [rows, columns] uint8 -> uint8 [rows, columns]."""
    rows = codes.shape[0]
    strips = torch.nn.functional.pad(codes, (0, 0, 0, -rows % STRIP)).view(-1, STRIP, codes.shape[1]).to(torch.int16)
    state = torch.zeros_like(strips)
    for back in range(-(-8 // bits)):
        state |= strips.roll(back, 1) << back * bits
    return (state & STATES - 1).to(torch.uint8).flatten(0, 1)[:rows]


def trellis_layout(bits: int, group: int, scale_bits: int, rows: int, columns: int) -> Layout:
    """Suffix -> (dtype, shape) of every tensor of a trellis of this shape."""
    codes: Layout = {"": (torch.uint8, (rows * row_bytes(columns, bits),))}
    return codes | scales_layout(rows, groups_of(group, columns), scale_bits)
