"""GWQ: its two ends, what is kept and how exactly, and that gradients choose better than other measures."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from tests.quantize.conftest import loss
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.encoding.integer import GroupedInteger
from layerwise.errors import InputError
from layerwise.quantize.gwq import largest_entries
from layerwise.recipe import parse_technique


def told(statistics: SiteStatistics, gradient: Tensor | None) -> SiteStatistics:
    return SiteStatistics((replace(statistics.uses[0], gradient=gradient),))


def encode(options: str, weight: Tensor, statistics: SiteStatistics) -> Any:
    encoder: Any = parse_technique(f"gwq:{options}")
    return encoder.encode(weight, statistics)


@pytest.fixture
def gradient(weight: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(weight.shape, generator=generator).abs() * torch.rand(weight.shape, generator=generator) ** -1.0


@pytest.mark.parametrize("options", ["", ",clip=false", ",symmetric=true", ",scale_bits=8"])
def test_the_two_ends(options: str, weight: Tensor, gradient: Tensor, moments: Any, site: Any) -> None:
    known = told(site(torch.ones(40), moments(72)[0]), gradient)
    nothing = encode(f"bits=3,group=32,share=0{options}", weight, known)
    plain: Any = parse_technique(f"rtn:bits=3,group=32{options}")
    nearest = plain.encode(weight, known)
    assert isinstance(nothing, GroupedInteger) and torch.equal(nothing.codes(), nearest.codes())
    assert torch.equal(nothing.decode(), nearest.decode())
    assert torch.equal(encode(f"bits=3,share=1{options}", weight, known).decode(), weight.half().float())


def test_the_kept_are_exact_and_the_rest_lies_on_a_grid_without_them(
    weight: Tensor, gradient: Tensor, site: Any
) -> None:
    weight = weight.clone()
    kept = largest_entries(gradient, 29)  # round(0.01 * 40 * 72)
    weight[kept] *= 100
    known = told(site(torch.ones(40), torch.ones(72)), gradient)
    encoded = encode("bits=3,group=32,clip=false", weight, known)
    decoded, rest = encoded.decode(), weight.masked_fill(kept, 0)
    assert len(encoded.column) == 29 and torch.equal(decoded[kept], weight[kept].half().float())
    for first in range(0, 72, 32):
        group = rest[:, first : first + 32]
        step = (group.amax(1).clamp(min=0) - group.amin(1).clamp(max=0)) / 7  # of a range that knows no kept entry
        error = (decoded - weight)[:, first : first + 32].masked_fill(kept[:, first : first + 32], 0)
        assert bool((error.abs() <= 0.501 * step[:, None]).all())


def test_no_other_entries_have_larger_gradients() -> None:
    values = torch.rand(3, 4, generator=torch.Generator().manual_seed(8))
    for count in range(13):
        kept = largest_entries(values, count)
        best = max(sum(chosen) for chosen in combinations(values.flatten().tolist(), count))
        assert int(kept.sum()) == count and float(values[kept].sum()) == pytest.approx(best)
    tied = largest_entries(torch.tensor([[1.0, 2.0, 1.0], [1.0, 3.0, 1.0]]), 4)
    assert tied.tolist() == [[True, True, True], [False, True, False]]


def test_gradients_choose_better_than_chance_or_size(weight: Tensor, moments: Any, site: Any) -> None:
    """Ablation: at the same bytes, the loss's own measure leaves less of the loss than a random or the largest share.

    Gradients ``g x^T`` whose rows and inputs are far from alike, as in trained networks.
    """
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(500, 72, generator=generator) * torch.rand(72, generator=generator) ** -1.5
    g = torch.randn(500, 40, generator=generator) * torch.rand(40, generator=generator) ** -1.5
    gradient = torch.stack([torch.outer(a, b).abs() for a, b in zip(g, x, strict=True)]).mean(0)
    columns, rows = x.T @ x / 500, g.T @ g / 500
    found = {}
    for name, chosen in (
        ("gradient", gradient),
        ("random", torch.rand(weight.shape, generator=generator)),
        ("size", weight.abs()),
        ("marginals", None),
    ):
        encoded = encode("bits=3,group=32,share=0.05", weight, told(site(rows, columns), chosen))
        found[name] = loss(encoded.decode() - weight, columns, rows)
    assert found["gradient"] < 0.5 * found["random"] and found["gradient"] < 0.5 * found["size"]
    assert found["marginals"] < 1.2 * found["gradient"]  # what stands in where the gradient itself is not known


def test_a_gradient_that_does_not_fit_is_refused(weight: Tensor, site: Any) -> None:
    known = site(torch.ones(40), torch.ones(72))
    for bad in (torch.ones(72, 40), torch.full((40, 72), float("nan"))):
        with pytest.raises(InputError, match="gradient"):
            encode("bits=3", weight, told(known, bad))
