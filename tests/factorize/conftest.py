"""Correlated curvatures and a weight, small and made on the spot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics, Use

Moments = Callable[..., tuple[Tensor, Tensor]]
Site = Callable[..., SiteStatistics]


@pytest.fixture
def moments() -> Moments:
    """``moments(n, seed)``: second moments [n, n] of correlated vectors, fitted and held out, from one distribution."""

    def make(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        mix = torch.randn(size, size, generator=generator) * torch.linspace(2, 0.05, size)[:, None]
        samples = torch.randn(2, 6 * size, size, generator=generator) @ mix / size**0.5
        fit, held = (s.T @ s / len(s) for s in samples)
        return fit, held

    return make


@pytest.fixture
def site() -> Site:
    """``site(R, C)``: statistics with these sides; the inputs' second moment is C unless given."""

    def make(rows: Tensor, columns: Tensor, inputs: Tensor | None = None) -> SiteStatistics:
        return SiteStatistics(
            (Use(rows, columns, columns if inputs is None else inputs, torch.ones(len(columns)), 1.0, 1000),)
        )

    return make


@pytest.fixture
def weight() -> Tensor:
    """[40, 72], with a spectrum that falls as a trained weight's does."""
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.linalg.qr(torch.randn(n, 40, generator=generator)).Q for n in (40, 72))
    return (left * torch.linspace(1, 0.05, 40) ** 2) @ right.T


def loss(change: Tensor, columns: Tensor, rows: Tensor | None = None) -> float:
    """tr(R D C D^T) in float64; R is the identity if None."""
    d = change.double()
    left = d if rows is None else rows.double() @ d
    return float((left @ columns.double() * d).sum())
