"""CALDERA: what the sum decodes to, that rounds lower the objective, and what the low-rank part is worth."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tests.factorize.conftest import loss
from torch import Tensor

from layerwise.encoding.encoded import layout_bytes
from layerwise.encoding.sums import Sum
from layerwise.factorize._whitening import Curvature
from layerwise.recipe import parse_technique


def trained(rows: int, columns: int) -> Tensor:
    """A weight whose singular values fall like those of trained ones: 1 / (1 + 0.3 i)."""
    generator, rank = torch.Generator().manual_seed(5), min(rows, columns)
    left, right = (torch.linalg.qr(torch.randn(n, rank, generator=generator)).Q for n in (rows, columns))
    return (left / (1 + 0.3 * torch.arange(rank))) @ right.T


def encode(recipe: str, weight: Tensor, known: Any) -> Any:
    return parse_technique(recipe).encode(weight, known)


def test_it_is_integers_plus_factors_with_exact_bytes(weight: Tensor, moments: Any, site: Any) -> None:
    encoder = parse_technique("caldera:bits=3,group=32,ratio=0.2,factor_bits=4")
    found = encoder.encode(weight, site(torch.ones(40), moments(72)[0]))
    assert isinstance(found, Sum) and found.nbytes == layout_bytes(encoder.layout(40, 72))
    assert (found.first.form, found.second.form, found.second.rank) == ("integer", "lowrank", 5)
    assert torch.equal(found.decode(), found.first.decode() + found.second.decode())


@pytest.mark.parametrize(("curvature", "share"), [("inputs", 0.99), ("loss", 0.97)])
def test_more_rounds_never_leave_more_and_help(curvature: str, share: float, moments: Any, site: Any) -> None:
    """Ablation: one round is a low-rank part and what it leaves over, rounded, never fitted to each other."""
    weight, fit, gradient = trained(96, 128), moments(128)[0], moments(96, 1)[0]
    rows, columns = Curvature.of(gradient if curvature == "loss" else torch.ones(96), 0.5), Curvature.of(fit, 0.01)
    errors = []
    for rounds in (1, 2, 4, 8):
        found = encode(f"caldera:bits=2,group=128,curvature={curvature},rounds={rounds}", weight, site(gradient, fit))
        change = (found.decode() - weight).double()
        errors.append(float((rows.times(change) * columns.times(change.T.contiguous()).T).sum()))
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < share * errors[0]


def test_the_low_rank_part_earns_its_bytes(moments: Any, site: Any) -> None:
    """Ablation: the grid alone, its groups so much finer that it spends more bytes, loses more on other tokens."""
    (fit, held), (gradient, held_gradient) = moments(128), moments(96, 1)
    noise = torch.randn(96, 128, generator=torch.Generator().manual_seed(3)) * 0.05
    for weight, share in ((trained(96, 128), 0.5), (noise, 1.0)):
        errors, sizes = [], []
        for recipe in ("caldera:bits=2,group=128,ratio=0.15,curvature=loss", "two_sided:bits=2,group=16,refits=0"):
            found = encode(recipe, weight, site(gradient, fit))
            errors.append(loss(found.decode() - weight, held, held_gradient))
            sizes.append(found.nbytes)
        assert sizes[0] < 0.95 * sizes[1] and errors[0] < share * errors[1]


def test_knowing_the_loss_helps_it(weight: Tensor, moments: Any, site: Any) -> None:
    (fit, held), (gradient, held_gradient) = moments(72), moments(40, 1)
    errors = [
        loss(
            encode(f"caldera:bits=2,group=24,curvature={c}", weight, site(gradient, fit)).decode() - weight,
            held,
            held_gradient,
        )
        for c in ("loss", "inputs")
    ]
    assert errors[0] < 0.85 * errors[1]
