"""Rays: what their weights sum to, what the clip of the density hides, and what the order of the stages is worth."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from layerwise.distill.field import FieldLesson, GridField, WaveField, ray_weights, views
from layerwise.errors import InputError
from layerwise.recipe import parse_distiller
from layerwise.trials.distillers import fit_to_pictures


def test_weights_of_a_ray_sum_to_what_is_not_let_through() -> None:
    density = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    weights, alpha = ray_weights(density, 0.1)
    assert torch.allclose(weights.sum(1), 1 - (1 - alpha).prod(1), atol=1e-12)
    assert bool((weights >= 0).all())


def test_what_the_clip_hides_cannot_be_seen() -> None:
    step = 0.01
    alpha = lambda u: 1 - math.exp(-math.exp(u) * step)  # noqa: E731
    assert alpha(15) - alpha(7) < 2e-5 and alpha(-2) - alpha(-15) < 1.4e-3


def test_nothing_flows_through_the_clip() -> None:
    pvd = parse_distiller("pvd")
    density = torch.tensor([-5.0, 0.0, 9.0], requires_grad=True)
    pvd.compared(density).sum().backward()  # type: ignore[attr-defined]
    assert density.grad is not None and density.grad.tolist() == [0, 1, 0]


def test_a_copy_has_nothing_to_learn() -> None:
    teacher = GridField(6, 8)
    lesson = FieldLesson(copy.deepcopy(teacher), teacher, views(1, 12, 0), 8, 48, 1)
    found = parse_distiller("pvd:steps=3").distill(lesson)
    assert found.before == found.after == 0 and found.losses == (0, 0, 0)


def test_stages_need_steps_left_for_the_output() -> None:
    with pytest.raises(InputError, match=r"first \+ second <= 1"):
        parse_distiller("pvd:first=0.7,second=0.5").distill(
            FieldLesson(WaveField(8, 4), GridField(4, 4), views(1, 12, 0), 4, 48, 1)
        )


def test_inner_quantities_teach_more_than_pixels_alone() -> None:
    rays, after = views(4, 12, 0), {}
    teacher = GridField(10, 8)
    fit_to_pictures(teacher, rays, 60, 0, lambda: None, 10)
    for setting in ("pvd:steps=160", "logits:steps=160", "pvd:steps=160,density=raw"):
        lesson = FieldLesson(WaveField(24, 8), teacher, rays, 10, 64, 2)
        after[setting] = parse_distiller(f"{setting},rate=0.01").distill(lesson).after
    staged, *others = after.values()
    assert staged < 0.8 * min(others), after
