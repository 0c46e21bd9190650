"""SliM-LLM and the high-impact ratio: exact averages, what they reduce to, and what their ideas are worth."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from tests.quantize.conftest import loss
from torch import Tensor

from layerwise.encoding.mixed import Groups
from layerwise.errors import InputError
from layerwise.quantize._mixed import fit_mixed, round_mixed_groups
from layerwise.quantize._rounding import factor
from layerwise.quantize.slim_llm import ranked, salient_cost
from layerwise.recipe import parse_technique


def encode(recipe: str, weight: Tensor, columns: Tensor, site: Any) -> Any:
    return parse_technique(recipe).encode(weight, site(torch.ones(len(weight)), columns))  # type: ignore[attr-defined]


@pytest.fixture
def uneven() -> tuple[Tensor, Tensor, Tensor]:
    """A weight [48, 128] and second moments, fitted and held out, with one group of columns that matters most."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(48, 128, generator=generator) * 0.05
    size = torch.ones(128)
    size[32:48], size[80:112] = 4.0, 0.2
    mix = torch.eye(128) + 0.05 * torch.randn(128, 128, generator=generator)
    samples = torch.randn(2, 900, 128, generator=generator) @ mix * size
    fit, held = (s.T @ s / len(s) for s in samples)
    return weight, fit, held


# ---------------------------------------------------------------- SliM-LLM


@pytest.mark.parametrize("columns", [128, 72])
def test_uniform_widths_and_clipped_ranges_are_gptq_bit_for_bit(columns: int, moments: Any, site: Any) -> None:
    weight = torch.randn(40, columns, generator=torch.Generator().manual_seed(5)) * 0.05
    fit, _ = moments(columns)
    for mine, theirs in (("clip", "true"), ("none", "false")):
        ours = encode(f"slim_llm:bits=3,group=32,allocate=false,search={mine}", weight, fit, site)
        assert torch.equal(ours.decode(), encode(f"gptq:bits=3,group=32,clip={theirs}", weight, fit, site).decode())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_average_is_exact(bits: int, uneven: Any, site: Any) -> None:
    weight, fit, _ = uneven
    widths = encode(f"slim_llm:bits={bits},group=16", weight, fit, site).groups.bits
    assert widths.double().mean() == bits and set(widths.tolist()) <= {bits - 1, bits, bits + 1}
    assert len(set(widths.tolist())) == 3


def search(bits: int, group: int, weight: Tensor, moment: Tensor) -> Any:
    technique: Any = parse_technique(f"slim_llm:bits={bits},group={group}")
    side = factor(moment, 0.01, largest_first=True)
    assert side is not None
    delta = weight.double().square() * side.importance().double()
    uniform = technique._groups(weight.shape[1])
    return technique.assigned(weight, moment, delta, uniform), delta, uniform


def test_the_reported_errors_are_those_of_the_assignments_and_the_least_is_taken(uneven: Any) -> None:
    from layerwise.quantize.slim_llm import plain

    weight, fit, _ = uneven
    found, delta, uniform = search(3, 16, weight, fit)
    order, widths = ranked(delta, uniform), uniform.bits.clone()
    least = None
    for moved, error in enumerate(found.errors):
        if moved:
            widths[order[moved - 1]], widths[order[-moved]] = 2, 4
        groups = Groups(128, 16, widths.clone())
        rounded = round_mixed_groups(weight, groups, *fit_mixed(weight, groups, fit.diagonal(), plain), None)
        expected = loss(rounded.decode() - weight, fit) / float(fit.diagonal().mean())
        assert error == pytest.approx(expected, rel=1e-5)
        if least is None or error < least[0]:
            least = (error, widths.clone())
    assert least is not None and torch.equal(found.groups.bits, least[1])


def test_four_groups_with_inputs_that_do_not_meet_are_searched_as_by_brute_force(uneven: Any) -> None:
    """With diagonal H and one salience order, no balanced assignment of four groups beats the nested ones by much."""
    from layerwise.quantize.slim_llm import plain

    weight, fit, _ = uneven
    moment = torch.diag(fit.diagonal())
    found, _, _ = search(3, 32, weight, moment)
    errors = []
    for widths in {*permutations((2, 3, 3, 4)), *permutations((2, 2, 4, 4)), (3, 3, 3, 3)}:
        groups = Groups(128, 32, torch.tensor(widths))
        rounded = round_mixed_groups(weight, groups, *fit_mixed(weight, groups, moment.diagonal(), plain), None)
        errors.append(loss(rounded.decode() - weight, moment) / float(moment.diagonal().mean()))
    assert min(found.errors) == pytest.approx(min(errors), rel=1e-5)


def test_with_diagonal_moments_salience_is_the_weighted_square(uneven: Any) -> None:
    weight, fit, _ = uneven
    squares = fit.diagonal()
    _, delta, uniform = search(3, 16, weight, torch.diag(squares))
    expected = (weight.double().square() * squares.double()).sum(0).view(8, 16).sum(1)
    assert torch.equal(ranked(delta, uniform), torch.argsort(expected, stable=True))


def test_ablation_the_order_of_salience_is_what_mixing_lives_on(uneven: Any) -> None:
    weight, fit, held = uneven
    side = factor(fit, 0.01, largest_first=True)
    found, delta, uniform = search(3, 16, weight, fit)
    order, moved = ranked(delta, uniform), int((found.groups.bits == 4).sum())
    shuffled = order[torch.randperm(8, generator=torch.Generator().manual_seed(1))]
    errors = {}
    for name, at in {"salient": order, "random": shuffled, "reversed": order.flip(0), "uniform": None}.items():
        widths = uniform.bits.clone()
        if at is not None:
            widths[at[:moved]], widths[at[len(at) - moved :]] = 2, 4
        groups = Groups(128, 16, widths)
        made = round_mixed_groups(weight, groups, *fit_mixed(weight, groups, fit.diagonal()), side)
        errors[name] = loss(made.decode() - weight, held)
    assert errors["salient"] < 0.7 * errors["uniform"]
    assert errors["salient"] < errors["random"] < errors["reversed"] and errors["uniform"] < errors["reversed"]


def test_salient_entries_count_more_and_their_error_falls(uneven: Any, site: Any) -> None:
    weight, fit, _ = uneven
    _, delta, _ = search(3, 128, weight, fit)
    cost = salient_cost(delta[:, :32])
    salient = delta[:, :32] > delta[:, :32].mean() + 2 * delta[:, :32].std(correction=0)
    assert 1 < cost.max() <= 100 and bool((cost[~salient] == 1).all()) and 0 < salient.float().mean() < 0.1
    assert bool((salient_cost(torch.ones(3, 4)) == 1).all())
    costs = torch.cat([salient_cost(part) for part in delta.split(32, 1)], 1)
    power = [
        (encode(f"slim_llm:bits=3,group=32,allocate=false,search={s}", weight, torch.diag(fit.diagonal()), site)
         .decode() - weight).abs().pow(2.4).mul(costs).sum()
        for s in ("sqc", "none")
    ]  # fmt: skip
    assert power[0] < 0.95 * power[1]


# ---------------------------------------------------------------- high-impact ratio


@pytest.mark.parametrize(("share", "bits"), [(0, 2), (1, 4)])
def test_no_share_and_the_whole_share_are_gptq_bit_for_bit(share: int, bits: int, uneven: Any, site: Any) -> None:
    weight, fit, _ = uneven
    ours = encode(f"high_impact:bits=2,high=4,group=32,share={share}", weight, fit, site)
    theirs = encode(f"gptq:bits={bits},group=32", weight, fit, site)
    assert torch.equal(ours.decode(), theirs.decode()) and ours.groups.first is None


def test_bytes_are_the_two_widths_and_the_map(uneven: Any, site: Any) -> None:
    weight, fit, _ = uneven
    ours = encode("high_impact:bits=2,high=4,group=32,share=0.25", weight, fit, site)
    assert ours.nbytes == 48 * (32 * 4 + 96 * 2) // 8 + 4 * 48 * 2 + 48 * 2 + 128 // 8 + 2
    assert int(ours.groups.first.sum()) == 32 and ours.spec()["first"] == 32


def test_the_columns_of_high_impact_are_those_whose_rounding_hurts(uneven: Any, site: Any) -> None:
    weight, fit, _ = uneven
    ours = encode("high_impact:bits=2,high=4,group=16,share=0.125", weight, fit, site)
    assert int(ours.groups.first[32:48].sum()) >= 14


def test_ablation_other_columns_of_the_same_share_do_worse(
    uneven: Any, site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerwise.quantize.high_impact import HighImpact

    weight, fit, held = uneven
    recipe = "high_impact:bits=2,high=4,group=32,share=0.25"
    best = loss(encode(recipe, weight, fit, site).decode() - weight, held)
    for seed in range(3):
        random = torch.zeros(128, dtype=torch.bool)
        random[torch.randperm(128, generator=torch.Generator().manual_seed(seed))[:32]] = True
        monkeypatch.setattr(HighImpact, "chosen", lambda self, weight, squares, at=random: at)
        assert best < 0.8 * loss(encode(recipe, weight, fit, site).decode() - weight, held)


def test_columns_of_high_impact_are_no_narrower() -> None:
    with pytest.raises(InputError, match="at least the 3 bits"):
        parse_technique("high_impact:bits=3,high=2")
