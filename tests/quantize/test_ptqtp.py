"""Two trit planes: the alternation's laws, the exactness of its choices, and what each idea is worth."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tests.quantize.conftest import loss
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.encoding.scales import Scales
from layerwise.quantize.ptqtp import alternate, pair_levels, residual_pairs, signs_as_pairs
from layerwise.recipe import parse_technique


def encoded(recipe: str, weight: Tensor, statistics: SiteStatistics | None = None) -> Any:
    made: Any = parse_technique(recipe)
    return made.encode(weight, statistics or SiteStatistics.uninformed(*weight.shape))


def relative_error(recipe: str, weight: Tensor) -> float:
    return float(((encoded(recipe, weight).decode() - weight) ** 2).sum() / (weight**2).sum())


def groups(count: int = 256, width: int = 128) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_errors_on_normal_weights_are_those_of_the_card() -> None:
    weight = groups().float()
    paper = relative_error("ptqtp:residual=false", weight)
    assert paper == pytest.approx(0.0276, rel=0.03)  # lexicographic ties
    assert relative_error("ptqtp", weight) <= paper
    assert paper < 0.85 * relative_error("rtn:bits=3,group=128", weight)  # with its clip search, at 3.15 bits
    assert paper < 0.2 * relative_error("ternary:group=128", weight)


def test_no_refinement_and_a_fixed_ratio_are_worse() -> None:
    """Ablation: the greedy planes alone, and scales tied as 3 to 1, which is an even grid of nine levels."""
    weight = groups()
    ones = torch.ones_like(weight)
    refined = alternate(weight, ones, signs_as_pairs(weight), 50)[1].sum()
    greedy = alternate(weight, ones, residual_pairs(weight, ones), 1)[2][:, 0].sum()  # scales only, trits as they are
    assert refined < 0.75 * greedy
    best = torch.full((len(weight),), torch.inf, dtype=torch.float64)
    for step in torch.linspace(0.2, 1.2, 60).double():
        best = torch.minimum(best, ((weight / step).round().clamp(-4, 4) * step - weight).square().sum(1))
    assert refined < 0.97 * best.sum()


def test_the_objective_never_rises() -> None:
    weight = groups()
    for start in (signs_as_pairs(weight), residual_pairs(weight, torch.ones_like(weight))):
        trace = alternate(weight, torch.ones_like(weight), start, 30)[2]
        settled = trace[:, 1:]  # after the first choice of pairs the two by two system is well conditioned
        assert bool((settled.diff(dim=1) <= 1e-9 * settled[:, :-1]).all())


def test_independent_choices_equal_brute_force_over_all_codes() -> None:
    weight = groups(5, 3)
    levels, _ = pair_levels(Scales(torch.tensor([[0.9, 0.4]]).half().expand(5, 2), None))
    chosen = (weight[..., None] - levels.double()).square().amin(2).sum(1)
    for i in range(5):
        every = [
            sum((float(weight[i, j]) - float(v)) ** 2 for j, v in enumerate(c))
            for c in itertools.product(levels[i, 0].tolist(), repeat=3)
        ]
        assert float(chosen[i]) == pytest.approx(min(every), abs=1e-12)


def test_a_group_of_two_planes_is_a_fixed_point() -> None:
    pairs = torch.randint(0, 9, (40, 64), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    weight = 0.9 * (pairs.long() // 3 - 1).double() + 0.25 * (pairs.long() % 3 - 1).double()
    scales, error, _ = alternate(weight, torch.ones_like(weight), pairs, 5)
    torch.testing.assert_close(scales, torch.tensor([[0.9, 0.25]]).double().expand(40, 2), rtol=1e-6, atol=1e-6)
    assert float(error.max()) < 1e-9


def test_planes_are_canonical_and_codes_are_those_of_their_levels() -> None:
    weight = groups(20).float()
    form = encoded("ptqtp:scale_bits=8,group=32", weight)
    pair = form.scales.values().view(20, 2, -1)
    assert bool((pair[:, 0] >= pair[:, 1]).all()) and bool((pair >= 0).all())
    levels = pair_levels(form.scales)[0][:, torch.arange(128) // 32]  # [rows, columns, 9]
    nearest = (levels - weight[..., None]).abs().amin(2)
    torch.testing.assert_close((form.decode() - weight).abs(), nearest, rtol=1e-5, atol=1e-6)
    assert not bool(encoded("ptqtp", torch.zeros(3, 9)).decode().any())


def test_weighting_and_feedback_pay_where_inputs_differ(weight: Tensor, moments: Any, site: Any) -> None:
    squares = torch.rand(72, generator=torch.Generator().manual_seed(3)) ** 6 * 50
    known = site(torch.ones(40), squares)
    plain, weighted = (
        loss(encoded(f"ptqtp:weighted={on}", weight, known).decode() - weight, torch.diag(squares))
        for on in ("false", "true")
    )
    assert weighted < 0.8 * plain
    columns, rows = moments(72)[0], moments(40, 1)[0]
    errors = [
        loss(encoded(f"ptqtp:feedback={on}", weight, site(rows, columns)).decode() - weight, columns, rows)
        for on in ("true", "false")
    ]
    assert errors[0] < 0.6 * errors[1]
