"""Wanda: magnitude pruning where inputs are alike, the best mask where they are uncorrelated, and what norms add."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from tests.quantize.conftest import loss
from torch import Tensor

from layerwise.errors import InputError
from layerwise.recipe import parse_technique


def encode(recipe: str, weight: Tensor, statistics: Any) -> Any:
    encoder: Any = parse_technique(recipe)
    return encoder.encode(weight, statistics)


@pytest.mark.parametrize("options", ["", "pattern=2:4", "bits=3", "sparsity=0.8,bits=2,group=16"])
def test_alike_inputs_make_it_magnitude_pruning(options: str, weight: Tensor, site: Any) -> None:
    for columns in (torch.full((72,), 3.0), torch.zeros(72), torch.eye(72)):
        known = site(torch.ones(40), columns)
        ours, plain = (encode(f"{name}:{options}", weight, known) for name in ("wanda", "magnitude"))
        assert torch.equal(ours.decode(), plain.decode())


@pytest.mark.parametrize("pattern", ["row", "2:4"])
def test_uncorrelated_inputs_get_the_best_mask_of_its_size(pattern: str, site: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, squares = torch.randn(5, 8, generator=generator), torch.rand(8, generator=generator) * 4 + 0.1
    decoded = encode(f"wanda:pattern={pattern}", weight, site(torch.ones(5), squares)).decode()
    for row, found in zip(weight, decoded, strict=True):
        cost = row.square() * squares
        gone = [set(g) for g in combinations(range(8), 4)]
        if pattern == "2:4":
            gone = [g for g in gone if sum(c < 4 for c in g) == 2]
        least = min(float(cost[list(g)].sum()) for g in gone)
        assert float(cost[found == 0].sum()) == pytest.approx(least)


def test_only_ratios_of_the_squares_matter(weight: Tensor, moments: Any, site: Any) -> None:
    fit, _ = moments(72)
    first, second = (encode("wanda:bits=3", weight, site(torch.ones(40), fit * k)) for k in (1.0, 2.0**40))
    assert torch.equal(first.decode(), second.decode())


def test_an_input_that_no_token_reached_counts_as_the_mean(weight: Tensor, site: Any) -> None:
    squares = torch.rand(72, generator=torch.Generator().manual_seed(0)) + 0.1
    squares[5] = 0
    filled = squares.clone()
    filled[5] = squares[squares > 0].mean()
    one, two = (encode("wanda", weight, site(torch.ones(40), s)).decode() for s in (squares, filled))
    assert torch.equal(one, two) and bool((one[:, 5] != 0).any())


@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.7])
def test_the_norms_of_the_inputs_are_what_lowers_the_error(sparsity: float, weight: Tensor, site: Any) -> None:
    """Ablation: without the norms the error on held-out inputs rises; with the norms of other inputs, above that."""
    generator = torch.Generator().manual_seed(3)
    samples = torch.randn(2, 400, 72, generator=generator) * (torch.randn(72, generator=generator) / 2).exp()
    fit, held = (s.T @ s / len(s) for s in samples)
    wrong = torch.diag(fit.diagonal()[torch.randperm(72, generator=generator)])
    ours, plain, permuted = (
        loss(encode(f"{name}:sparsity={sparsity}", weight, site(torch.ones(40), h)).decode() - weight, held)
        for name, h in (("wanda", fit), ("magnitude", fit), ("wanda", wrong))
    )
    assert ours < 0.7 * plain and plain < 0.8 * permuted


def test_statistics_of_another_shape_are_refused(weight: Tensor, site: Any) -> None:
    for columns in (torch.ones(71), torch.full((72,), float("nan"))):
        with pytest.raises(InputError, match="72 inputs"):
            encode("wanda", weight, site(torch.ones(40), columns))
