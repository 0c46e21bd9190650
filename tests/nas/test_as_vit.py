"""As-ViT: lengths of known maps, conditions of known kernels, the rank sum and its tie, growth without training."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.nas.pictures import TINY, bars, tiny_task
from torch import Tensor

from layerwise.nas._space import Architecture, Space, shapes
from layerwise.nas.as_vit import (
    AsVit,
    circle_length,
    conditioning,
    kernel_condition,
    larger,
    least_rank_sum,
    length,
    orthonormal_pair,
)
from layerwise.nas.network import Loose, block, drawn, enter

CIRCLE = orthonormal_pair(TINY, torch.Generator().manual_seed(0))


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double())[0].float()


def test_the_circle_is_orthonormal() -> None:
    flat = CIRCLE.flatten(1)
    assert torch.allclose(flat @ flat.T, torch.eye(2), atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
def test_an_orthogonal_map_keeps_the_length(scale: float) -> None:
    maps = [orthogonal(64, seed) for seed in range(3)]

    def run(pixels: Tensor) -> Tensor:
        x = pixels.flatten(1)
        for each in maps:
            x = x @ each
        return scale * x

    assert circle_length(run, CIRCLE, 10) == pytest.approx(2 * math.pi * scale, rel=1e-5)


def test_the_derivative_is_that_of_small_steps() -> None:
    architecture = Architecture(16, (2, 1))
    values = drawn(shapes(TINY, architecture), torch.Generator().manual_seed(3))
    parts = Loose({n: v.double() for n, v in values.items()}, norms=False)

    def run(angles: Tensor) -> Tensor:
        pixels = CIRCLE[0].double() * angles.cos().view(-1, 1, 1, 1) + CIRCLE[1].double() * angles.sin().view(
            -1, 1, 1, 1
        )
        x = enter(parts, TINY, pixels)
        for index in range(2):
            x = block(parts, index, x)
        return x.flatten(1)

    angles, small = torch.arange(10).double() * 2 * math.pi / 10, 1e-5
    speed = ((run(angles + small) - run(angles - small)) / (2 * small)).norm(dim=1).mean()
    assert length(TINY, architecture, values, CIRCLE) == pytest.approx(float(speed) * 2 * math.pi, rel=1e-4)


def test_a_kernel_of_orthonormal_gradients_has_condition_one() -> None:
    assert kernel_condition(torch.eye(5, 9, dtype=torch.float64)) == pytest.approx(1.0)
    assert kernel_condition(torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))) == pytest.approx(16.0)
    assert kernel_condition(torch.ones(3, 3, dtype=torch.float64)) == math.inf


def test_the_kernel_is_that_of_gradients_one_by_one() -> None:
    architecture = Architecture(16, (1,))
    values = drawn(shapes(TINY, architecture), torch.Generator().manual_seed(1))
    images = bars(4).pixels
    from layerwise.nas.network import forward

    rows = []
    for image in images:
        leaves = {n: v.clone().requires_grad_() for n, v in values.items()}
        out = forward(Loose(leaves), TINY, 1, image[None]).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(out, list(leaves.values()))]).double())
    assert conditioning(TINY, architecture, values, images) == pytest.approx(
        kernel_condition(torch.stack(rows)), rel=1e-2
    )


def test_the_rank_sum_and_its_tie() -> None:
    assert least_rank_sum([5.0, 1.0, 3.0], [9.0, 8.0, 1.0]) == 1  # sums 2, 1, 3
    assert least_rank_sum([1.0, 100.0], [1.0, 1.1]) == 0  # a tie: the kernels are further apart
    assert least_rank_sum([1.0, 1.1], [1.0, 100.0]) == 1  # and here the lengths
    assert least_rank_sum([math.inf, 2.0], [1.0, 1.0]) == 1


def test_growth_is_one_block_one_width_or_both() -> None:
    space = Space(1, 8, 4, 3, (16, 32, 48), (1, 2, 3), (1, 2))
    here = larger(space, Architecture(16, (1,)), (1, 2, 1))
    assert here == [Architecture(16, (1, 2)), Architecture(32, (1,)), Architecture(32, (1, 2))]
    assert larger(space, Architecture(48, (1, 2, 1)), (1, 2, 1)) == []


def test_with_norms_left_in_the_length_no_longer_tells_the_weights_apart() -> None:
    """The figure is of degree one in what comes in; a norm in the way hides it, which is why norms are left out."""
    architecture = Architecture(16, (1,))
    values = drawn(shapes(TINY, architecture), torch.Generator().manual_seed(1))
    wide = {**values, "patch.weight": values["patch.weight"] * 4, "positions": values["positions"] * 4}
    out, kept = (
        length(TINY, architecture, wide, CIRCLE, norms=n) / length(TINY, architecture, values, CIRCLE, norms=n)
        for n in (False, True)
    )
    assert out > 3.9 and out > kept


def test_the_figures_decide_and_cost_less_than_a_search_that_trains() -> None:
    task = replace(tiny_task(steps=80), limit=0.6)
    found = {score: AsVit(score=score, inits=1, points=4).search_in(task) for score in ("both", "parameters")}
    assert found["both"].seen and not found["parameters"].seen and found["parameters"].searched == 0
    assert found["both"].searched < 0.35 < 0.8 < found["both"].total
