"""TRELLIS: best paths, the identity behind the feedback, and what values that depend on the codes before are worth."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from tests.quantize.conftest import loss
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.encoding.scales import Scales
from layerwise.encoding.trellis import STRIP, states_of
from layerwise.encoding.trellis_tables import UNIT, table
from layerwise.quantize._rounding import factor
from layerwise.quantize._strips import Curvature, Strips, cut, first_scales, recut
from layerwise.recipe import parse_technique


def strip_of(wanted: Any, cost: Any, count: int, bits: int) -> Any:
    """The path that the compiled loop takes."""
    from layerwise.encoding.trellis_loops import STATES, cut_strip

    path = np.empty(STRIP, np.uint8)
    room, came = np.empty((3, STATES), np.float32), np.empty((STRIP, STATES // 2), np.uint8)
    cut_strip(wanted, cost, count, bits, table(bits).float().numpy(), room, came, path)
    return path


@pytest.mark.parametrize(("bits", "count"), [(4, 3), (3, 4), (2, 6), (5, 2), (1, 10)])
def test_a_strip_takes_the_best_of_all_paths(bits: int, count: int) -> None:
    """Few rows, so that every path can be tried; the absent ones close the ring with code 0."""
    generator = np.random.default_rng(bits)
    values = table(bits).float()
    for _ in range(5):
        wanted, cost = np.zeros(STRIP, np.float32), np.zeros(STRIP, np.float32)
        wanted[:count] = generator.normal(size=count) * 40
        cost[:count] = generator.uniform(0.1, 2, size=count)
        every = torch.tensor(list(itertools.product(range(2**bits), repeat=count)), dtype=torch.uint8).T
        points = values[states_of(every, bits).long()]
        errors = ((points - torch.from_numpy(wanted)[:count, None]) ** 2 * torch.from_numpy(cost)[:count, None]).sum(0)
        path = strip_of(wanted, cost, count, bits)
        codes = torch.from_numpy(path[:count] % 2**bits)
        assert not (path[count:] % 2**bits).any()
        assert torch.equal(states_of(codes[:, None], bits)[:, 0], torch.from_numpy(path[:count]))
        mine = float((errors * (every == codes[:, None]).all(0)).sum())
        assert mine == pytest.approx(float(errors.min()), rel=1e-5)


@pytest.mark.parametrize(("bits", "decibels"), [(1, 5.04), (2, 10.82), (3, 16.60), (4, 22.12), (5, 27.34)])
def test_on_normal_numbers_it_is_worth_what_its_table_says(bits: int, decibels: float) -> None:
    weight = torch.randn(512, 128, generator=torch.Generator().manual_seed(1))
    curvature = Curvature(None, None, None, torch.ones(512, dtype=torch.float64))
    scales = torch.full((512, 1), UNIT[bits])
    states = cut(weight, bits, 0, scales, curvature, 0)
    error = float((table(bits).float()[states.long()] * scales - weight).square().mean())
    assert -10 * np.log10(error) == pytest.approx(decibels, abs=0.12)


def test_the_rows_factor_is_one_of_strips(moments: Any) -> None:
    """R = L D L^T with whole 32 x 32 blocks in D, whose diagonal is what a row's own error costs."""
    rows = factor(moments(80)[0], 0.5)
    assert rows is not None
    strips = Strips.of(rows)
    lower = strips.upper.T
    middle = torch.linalg.solve_triangular(lower, rows.matrix, upper=False)
    middle = torch.linalg.solve_triangular(lower, middle.T, upper=False)
    inside = torch.block_diag(*(torch.ones(n, n) for n in (32, 32, 16))).bool()
    assert float(middle[~inside].abs().max()) < 1e-10
    assert torch.allclose(middle.diagonal(), strips.pivots, rtol=1e-10)
    assert torch.equal(lower * inside, torch.eye(80, dtype=torch.float64))


def parts(weight: Tensor, statistics: SiteStatistics, bits: int, sweeps: int) -> tuple[Tensor, Tensor, Curvature]:
    curvature = Curvature.of(weight, statistics)
    scales = Scales.of(first_scales(weight, bits, 24, curvature.importance(statistics)), 16).values()
    return cut(weight, bits, 24, scales, curvature, sweeps), scales, curvature


@pytest.mark.parametrize("one_sided", [False, True])
def test_sweeps_only_lower_the_objective(one_sided: bool, weight: Tensor, moments: Any, site: Any) -> None:
    rows = torch.rand(40, generator=torch.Generator().manual_seed(0)) + 0.1 if one_sided else moments(40, 1)[0]
    statistics = site(rows, moments(72)[0])

    def objective(states: Tensor, scales: Tensor, c: Curvature) -> float:
        assert c.columns is not None
        change = table(2).float()[states.long()].double() * scales.double()[:, torch.arange(72) // 24] - weight
        of_rows = torch.diag(c.weights) if c.rows is None else c.rows.matrix
        return loss(change[:, c.columns.order], c.columns.matrix, of_rows)

    values = [objective(*parts(weight, statistics, 2, k)) for k in (0, 1, 2, 4)]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(values))
    assert values[-1] < 0.97 * values[0]
    states, scales, curvature = parts(weight, statistics, 2, 1)
    assert torch.equal(recut(weight, 2, 24, scales, curvature, 1, states), parts(weight, statistics, 2, 2)[0])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_that_depend_on_the_codes_before_lower_the_loss(bits: int, moments: Any, site: Any) -> None:
    """Ablation: even steps with the same feedback, which take more bytes for their zeros, on held-out statistics."""
    weight = torch.randn(96, 72, generator=torch.Generator().manual_seed(5)) * 0.05
    (fit, held), (gradient, held_gradient) = moments(72), moments(96, 1)
    errors, sizes = [], []
    for encoder in ("trellis", "two_sided"):
        encoded = parse_technique(f"{encoder}:bits={bits},group=0").encode(weight, site(gradient, fit))
        errors.append(loss(encoded.decode() - weight, held, held_gradient))
        sizes.append(encoded.nbytes)
    assert sizes[0] < sizes[1]
    assert errors[0] < 0.85 * errors[1]


def test_the_output_side_lowers_the_loss_on_other_tokens(weight: Tensor, moments: Any, site: Any) -> None:
    """Ablation: only the diagonal of the rows' curvature."""
    weight = weight.T.contiguous()  # 72 rows, three strips
    (fit, held), (gradient, held_gradient) = moments(40), moments(72, 1)
    for bits in (2, 3, 4):
        errors = []
        for rows in (gradient, torch.diag(gradient.diagonal())):
            encoded = parse_technique(f"trellis:bits={bits},group=0").encode(weight, site(rows, fit))
            errors.append(loss(encoded.decode() - weight, held, held_gradient))
        assert errors[0] < 0.9 * errors[1]


def test_a_table_counts_each_row_by_its_weight_but_ruins_none(weight: Tensor, site: Any) -> None:
    """Entries that are looked up often come out nearer to what they were, the others not far from where they were."""
    often = torch.full((40,), 0.01)
    often[::8] = 100.0
    encoder = parse_technique("trellis:bits=2,group=0")
    forms = [encoder.encode(weight, site(rows, torch.ones(72))) for rows in (often, torch.ones(40))]
    mine, alike = ((form.decode() - weight).square().mean(1)[:STRIP] for form in forms)
    assert float(mine[::8].mean()) < 0.7 * float(alike[::8].mean())
    assert float(mine[1::8].mean()) < 1.6 * float(alike[1::8].mean())


@pytest.mark.parametrize("bits", [2, 4])
def test_groups_with_long_tails_get_wider_scales(bits: int) -> None:
    """Ablation: the deviation alone cuts the tails off."""
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(256, 128, generator=generator)
    tailed = normal * torch.randn(256, 128, generator=generator).abs() ** 2
    even, curvature = torch.ones(128), Curvature(None, None, None, torch.ones(256, dtype=torch.float64))
    assert torch.allclose(
        first_scales(normal, bits, 0, even)[:, 0], normal.square().mean(1).sqrt() * UNIT[bits], rtol=0.2
    )

    def error(scales: Tensor) -> float:
        points = table(bits).float()[cut(tailed, bits, 0, scales, curvature, 0).long()] * scales
        return float((points - tailed).square().mean())

    plain = tailed.square().mean(1, keepdim=True).sqrt() * UNIT[bits]
    assert error(first_scales(tailed, bits, 0, even)) < 0.9 * error(plain)
