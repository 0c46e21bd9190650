"""Orthogonal matrices that mix all coordinates: Hadamard matrices and random ones, also such that leave 1 alone.

    H      [n, n], entries +1 and -1, H H^T = n I, first column 1. Sylvester's doubling H_2n = [[H, H], [H, -H]]
           from 1, or from Paley's H_12, H_20, H_24, H_28, H_36, … (made from the squares modulo a prime)
    mixed  H diag(signs) / sqrt(n)             all entries ± 1 / sqrt(n); signs drawn from a seed
    mixed, keeping 1:  H diag(signs) H^T / n   with signs[0] = +1, so that 1 is mapped to itself

A LayerNorm takes off the mean, so it commutes with an orthogonal matrix only if that matrix keeps 1. Everything is
float64 and a function of (size, seed).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def mixing(size: int, seed: int, keeps_ones: bool = False, random: bool = False) -> Tensor:
    """``[size, size]`` float64, orthogonal; by a Hadamard matrix where one is known, else (or ``random``) by QR."""
    draw = torch.Generator().manual_seed(seed)
    found = None if random else hadamard(size)
    if found is not None:
        signs = torch.randint(0, 2, (size,), generator=draw).double() * 2 - 1
        if not keeps_ones:
            return found * signs / size**0.5
        signs[0] = 1.0
        return (found * signs) @ found.T / size
    if not keeps_ones or size < 2:
        return turned(size, draw)
    ones = torch.full((size, 1), size**-0.5, dtype=torch.float64)
    others = torch.linalg.qr(torch.cat([ones, torch.randn(size, size - 1, generator=draw, dtype=torch.float64)], 1))[0]
    others = others[:, 1:]  # orthonormal and orthogonal to 1
    return others @ turned(size - 1, draw) @ others.T + ones @ ones.T


def turned(size: int, draw: torch.Generator) -> Tensor:
    """A random orthogonal matrix, evenly distributed: QR with the signs of R's diagonal taken out."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


@cache
def hadamard(size: int) -> Tensor | None:
    """A Hadamard matrix ``[size, size]`` whose first column is 1; None where these constructions know none."""
    if size in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:size, :size]
    if size < 1 or size % 4:
        return None
    found = paley(size)
    if found is None:
        half = hadamard(size // 2)
        if half is None:
            return None
        found = torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])
    return found * found[:, :1]


def paley(size: int) -> Tensor | None:
    """Paley's constructions from a prime q: order q + 1 where q = 3 mod 4, order 2 (q + 1) where q = 1 mod 4.

    Not used for powers of two, where doubling gives the usual matrix.
    """
    if size & (size - 1) == 0:
        return None
    q = size - 1
    if q % 4 == 3 and is_prime(q):
        skew = torch.zeros(size, size, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1.0, -1.0, jacobsthal(q)
        return skew + torch.eye(size, dtype=torch.float64)
    q = size // 2 - 1
    if q % 4 == 1 and is_prime(q):
        symmetric = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        symmetric[0, 1:], symmetric[1:, 0], symmetric[1:, 1:] = 1.0, 1.0, jacobsthal(q)
        off = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        on = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(symmetric, off) + torch.kron(torch.eye(q + 1, dtype=torch.float64), on)
    return None


def jacobsthal(q: int) -> Tensor:
    """``[q, q]``: +1 where i - j is a square modulo q, -1 where it is none, 0 on the diagonal."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[torch.arange(1, q) ** 2 % q] = 1.0
    character[0] = 0.0
    places = torch.arange(q)
    return character[(places[:, None] - places[None, :]) % q]


def is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))
