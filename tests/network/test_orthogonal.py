"""Orthogonal matrices: Hadamard's law for every order that is made, and what is kept."""

from __future__ import annotations

import pytest
import torch

from layerwise.network.orthogonal import hadamard, is_prime, mixing


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 40, 48, 60, 64, 76, 96, 192, 384])
def test_a_hadamard_matrix_has_orthogonal_columns_of_signs(size: int) -> None:
    found = hadamard(size)
    assert found is not None
    assert torch.equal(found.abs(), torch.ones_like(found))
    assert torch.equal(found @ found.T, size * torch.eye(size, dtype=torch.float64))
    assert torch.equal(found[:, 0], torch.ones(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [0, 3, 6, 50, 52, 172])
def test_other_orders_are_not_made_up(size: int) -> None:
    assert hadamard(size) is None


@pytest.mark.parametrize("size", [1, 2, 5, 12, 48, 50])
@pytest.mark.parametrize("keeps_ones", [False, True])
@pytest.mark.parametrize("random", [False, True])
def test_mixing_is_orthogonal_and_keeps_ones_where_asked(size: int, keeps_ones: bool, random: bool) -> None:
    found = mixing(size, 3, keeps_ones, random)
    assert torch.allclose(found @ found.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.equal(found, mixing(size, 3, keeps_ones, random))
    if keeps_ones:
        ones = torch.ones(size, dtype=torch.float64)
        assert torch.allclose(ones @ found, ones, atol=1e-12)
    elif size > 2:
        assert not torch.equal(found, mixing(size, 4, keeps_ones, random))


def test_no_entry_of_a_mixing_stands_out() -> None:
    assert torch.allclose(mixing(192, 0).abs(), torch.tensor(192**-0.5, dtype=torch.float64))
    assert mixing(192, 0, keeps_ones=True).abs().max() < 5 * 192**-0.5


def test_primes() -> None:
    assert [n for n in range(30) if is_prime(n)] == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]
