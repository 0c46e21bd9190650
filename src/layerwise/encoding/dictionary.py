"""Form ``dictionary``: every row is a few atoms of a small dictionary, each times a coefficient.

The columns are cut into blocks of ``block`` (the last may be short). Block b has k atoms of its own, and a row of it is
the sum of ``kept`` of them:

    W[i, b] = sum_{j < kept} coefficient[i, b, j] atom_b[place[i, b, j]]

=======================  ====================================  ==================================================
stored tensor            type and shape                        holds
=======================  ====================================  ==================================================
``""``                   1-D uint8                             main tensor of ``coefficients`` [rows, blocks kept]
``_coefficients_…``                                            the other tensors of its form
``_place``               uint8 [rows row_bytes(blocks kept,    which atoms: packed codes of ``bits`` =
                         bits)]                                ceil(log2 k), rising within a row and block
``_atoms``               of its form                           main tensor of ``atoms`` [k, columns]: in the columns
                                                               of block b the atoms of block b
``_atoms_…``                                                   the other tensors of its form
=======================  ====================================  ==================================================

``decode`` adds j = 0, 1, … in float32, product and sum rounded separately, so an entry is the same however many rows
are asked for. Against a low-rank form, in which all rows lie in one k-dimensional space, each row has a space of its
own of ``kept`` dimensions; that costs ``bits`` for every coefficient. A product decodes: gathering atoms is no faster.
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

PLACE = "_place"
PART_FORMS = ("dense", "integer")
MOST_ATOMS = 256


@dataclass(frozen=True, eq=False)
class Dictionary(Encoded):
    """``coefficients`` [rows, blocks kept], packed ``places`` and ``atoms`` [k, columns]."""

    form: ClassVar[str] = "dictionary"
    coefficients: Encoded
    places: Tensor
    atoms: Encoded
    block: int

    @staticmethod
    def of(coefficients: Encoded, places: Tensor, atoms: Encoded, block: int) -> Dictionary:
        """Pack ``places`` [rows, blocks kept], the atoms that each coefficient belongs to, rising within a block."""
        return Dictionary(coefficients, pack(places.to(torch.uint8), place_bits(atoms.shape[0])), atoms, block)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.coefficients.shape[0], self.atoms.shape[1]

    @property
    def blocks(self) -> int:
        return -(-self.atoms.shape[1] // self.block)

    @property
    def kept(self) -> int:
        return self.coefficients.shape[1] // self.blocks

    def tensors(self) -> dict[str, Tensor]:
        parts = joined({"coefficients": self.coefficients, "atoms": self.atoms})
        return parts | {PLACE: self.places.reshape(-1)}

    def spec(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "layout": LAYOUT_VERSION,
            "shape": list(self.shape),
            "block": self.block,
            "coefficients": self.coefficients.spec(),
            "atoms": self.atoms.spec(),
        }

    @classmethod
    def restore(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Dictionary:
        rows, columns = stored_shape(spec)
        check_version(spec, "places")
        block = spec.get("block")
        if type(block) is not int or not 1 <= block <= columns:
            raise InputError(f"a block of a dictionary form has 1 to {columns} columns, not {block!r}")
        parts = {suffix: tensor for suffix, tensor in tensors.items() if suffix != PLACE}
        coefficients, atoms = restored(spec, parts, ("coefficients", "atoms"), PART_FORMS)
        blocks, count = -(-columns // block), atoms.shape[0]
        fits = coefficients.shape[0] == rows and coefficients.shape[1] % blocks == 0 and atoms.shape[1] == columns
        if not fits or count > MOST_ATOMS or coefficients.shape[1] > blocks * count:
            raise InputError(
                f"coefficients {list(coefficients.shape)} and atoms {list(atoms.shape)} do not make a matrix "
                f"{[rows, columns]} in blocks of {block}"
            )
        width = row_bytes(coefficients.shape[1], place_bits(count))
        given = {PLACE: tensors[PLACE]} if PLACE in tensors else {}
        check_tensors({PLACE: (torch.uint8, (rows * width,))}, given)
        made = cls(coefficients, tensors[PLACE].view(rows, width), atoms, block)
        places = made._places(made.places).to(torch.int16)
        if bool((places >= count).any()) or bool((places[:, :, 1:] <= places[:, :, :-1]).any()):
            raise InputError(f"{PLACE} must rise within each row and block and stay below {count}")
        return made

    def decode_rows(self, start: int, stop: int) -> Tensor:
        return self._sum(self.coefficients.decode_rows(start, stop), self.places[start:stop])

    def take_rows(self, index: Tensor) -> Tensor:
        check_index(index, self.shape[0])
        return self._sum(self.coefficients.take_rows(index), self.places[index])

    def decode(self) -> Tensor:
        return torch.cat([self.decode_rows(a, b) for a, b in self.row_chunks()])

    def _places(self, packed: Tensor) -> Tensor:
        """Codes uint8 [rows, blocks, kept]."""
        codes = unpack(packed, self.coefficients.shape[1], place_bits(self.atoms.shape[0]))
        return codes.view(len(packed), self.blocks, self.kept)

    def _sum(self, coefficients: Tensor, packed: Tensor) -> Tensor:
        places, atoms = self._places(packed).long(), self._atoms
        out = torch.zeros(len(packed), self.shape[1], device=coefficients.device)
        parts = coefficients.view(len(packed), self.blocks, self.kept)
        for b, first in enumerate(range(0, self.shape[1], self.block)):
            columns = slice(first, first + self.block)
            for j in range(self.kept):
                out[:, columns] += parts[:, b, j, None] * atoms[places[:, b, j], columns]
        return out

    @cached_property
    def _atoms(self) -> Tensor:
        return self.atoms.decode()


def place_bits(atoms: int) -> int:
    """Bits that tell so many atoms apart, at least one."""
    return max(1, (atoms - 1).bit_length())


def dictionary_layout(coefficients: Layout, atoms: Layout, rows: int, count: int, entries: int) -> Layout:
    """Suffix -> (dtype, shape); ``entries`` coefficients a row, of ``count`` atoms."""
    parts = joined_layout({"coefficients": coefficients, "atoms": atoms})
    return parts | {PLACE: (torch.uint8, (rows * row_bytes(entries, place_bits(count)),))}
