"""Packing of 1 to 8 bit codes: the documented layout, its size, and its inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerwise.encoding.bitplanes import pack, plane_widths, row_bytes, unpack, unpack_columns


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


@given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 70), st.integers(0, 99))
def test_unpack_inverts_pack(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits, seed)
    packed = pack(codes, bits)
    assert packed.shape == (rows, row_bytes(columns, bits))
    assert torch.equal(unpack(packed, columns, bits), codes)


def test_planes_are_the_binary_digits_of_the_width() -> None:
    widths = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
    assert {bits: plane_widths(bits) for bits in range(1, 9)} == widths


def test_layout_version_1_byte_for_byte() -> None:
    """A stored file must mean the same for ever: the bytes of the picture in the module's docstring."""
    codes = torch.tensor([[1, 2, 7, 4, 5]], dtype=torch.uint8)
    low = [0b00_11_10_01, 0b01]
    high = [0b11100]
    assert pack(codes, 3).tolist() == [low + high]
    assert pack(torch.tensor([[0xA, 0x3, 0xF]], dtype=torch.uint8), 4).tolist() == [[0x3A, 0x0F]]


@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_are_independent_runs_of_bytes(bits: int) -> None:
    codes = random_codes(11, 29, bits)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed[3:7], 29, bits), codes[3:7])
    index = torch.tensor([10, 0, 0, 5])
    assert torch.equal(unpack(packed[index], 29, bits), codes[index])


def test_a_row_ends_on_a_whole_byte_per_plane() -> None:
    assert row_bytes(172, 3) == 43 + 22  # 172 * 2 / 8 and 172 / 8, each rounded up
    assert row_bytes(1, 7) == 3
    assert row_bytes(64, 5) == 40


def test_impossible_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 8 bits"):
        plane_widths(9)


@pytest.mark.parametrize("bits", range(1, 9))
def test_columns_can_be_unpacked_alone(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 45), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    index = torch.tensor([44, 0, 7, 8, 7])
    assert torch.equal(unpack_columns(pack(codes, bits), index, bits, 45), codes[:, index])
