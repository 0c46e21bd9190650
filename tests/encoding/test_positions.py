"""Positions of kept entries: packing and its inverse, exact bytes, and the one way in which they are written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerwise.encoding.positions import (
    PATTERNS,
    kept_of_fours,
    pack_positions,
    position_bytes,
    unpack_positions,
)


def mask_of(rows: int, columns: int, pattern: str, seed: int = 0) -> Tensor:
    score = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    if pattern == "mask":
        return score > 0.6
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for first in range(0, columns, 4):
        best = score[:, first : first + 4].argsort(1)[:, -2:]
        mask[:, first : first + 4].scatter_(1, best, True)
    return mask


@given(st.sampled_from(PATTERNS), st.integers(1, 6), st.integers(1, 60), st.integers(0, 99))
def test_packing_and_its_inverse(pattern: str, rows: int, columns: int, seed: int) -> None:
    mask = mask_of(rows, columns, pattern, seed)
    packed = pack_positions(mask, pattern)
    assert packed.dtype == torch.uint8 and tuple(packed.shape) == (rows, position_bytes(columns, pattern))
    assert torch.equal(unpack_positions(packed, columns, pattern), mask)
    if pattern == "2:4":
        assert bool((mask.sum(1) == kept_of_fours(columns)).all())


def test_twelve_columns_of_two_in_four_are_a_byte() -> None:
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[0, [0, 1, 4, 7, 10, 11]] = True  # digits 0, 2, 5
    assert pack_positions(mask, "2:4").tolist() == [[0 + 6 * 2 + 36 * 5]]
    assert position_bytes(1536, "2:4") == 128 and position_bytes(1536, "mask") == 192


def test_a_byte_that_means_nothing_keeps_nothing() -> None:
    assert not bool(unpack_positions(torch.tensor([[216], [255]], dtype=torch.uint8), 12, "2:4").any())


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_a_short_last_run_keeps_at_most_two(columns: int) -> None:
    assert kept_of_fours(columns) == min(2, columns) and kept_of_fours(4 + columns) == 2 + min(2, columns)


def test_another_mask_is_not_written_as_two_in_four() -> None:
    with pytest.raises(ValueError, match="two of every four"):
        pack_positions(torch.ones(1, 4, dtype=torch.bool), "2:4")
