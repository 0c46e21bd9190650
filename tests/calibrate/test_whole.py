"""Statistics of a convolution, against sums over sampled products of gradient and patch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.vision import random_inputs, tiny_resnet
from torch import Tensor, nn

import layerwise
from layerwise.calibrate.passes import reverse
from layerwise.calibrate.reverse import DRAWS, back_propagate
from layerwise.calibrate.statistics import diagonal
from layerwise.network.module import running


def test_marginals_are_those_of_the_weight_gradient(tmp_path: Path) -> None:
    """``M`` of an image is the gradient of the weight itself, so autograd gives it without patches or hooks."""
    pixels = random_inputs(160, 3, 8, 8)
    network = layerwise.open(tiny_resnet(), pixels)
    calibration = layerwise.calibrate(network, work=tmp_path / "work", threads=1)
    (part,) = list(reverse(calibration, ()))
    assert not part.unreached
    loss, fit = calibration.loss, calibration.splits.fit
    expected: dict[str, Tensor] = {}
    terms = 0
    for i, batch in enumerate(fit):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad(), running(network) as run:
            assert batch.pixels is not None
            target = loss.target(run(batch.pixels.clone()), batch)
        directions = [loss.direction(target, generator) for _ in range(DRAWS)]
        for direction in directions:
            for image, at in zip(batch.pixels, direction, strict=True):
                for name, gradient in weight_gradients(network, image, at).items():
                    m = gradient.flatten(1).double()
                    expected[name] = expected.get(name, 0) + m.T @ m
        terms += len(target)
    for site in network.tree.sites:
        use = part.sites[site.name].fit.uses[0]
        found = use.columns.double()
        mean = expected[site.name] / (terms * DRAWS)
        if use.tokens >= 2 * site.columns:  # else it is drawn towards an even prior
            torch.testing.assert_close(found, mean, rtol=1e-3, atol=1e-4 * float(mean.diagonal().max()))
        assert float(diagonal(found).sum()) == pytest.approx(float(mean.diagonal().sum()), rel=1e-3)
    calibration.journal.close()


def weight_gradients(network, image: Tensor, direction: Tensor) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    names = [s.parameter for s in network.tree.sites]
    with torch.enable_grad(), running(network) as run:
        weights = [network.module.get_parameter(n).requires_grad_() for n in names]
        gradients = torch.autograd.grad(run(image.unsqueeze(0).clone()), weights, direction.unsqueeze(0))
    return {n.removesuffix(".weight"): g for n, g in zip(names, gradients, strict=True)}


def test_both_ways_to_the_marginals_agree() -> None:
    """Many positions take ``M`` itself, few take the positions' products; the sums are the same."""
    from layerwise.calibrate.observer import observing
    from layerwise.calibrate.reverse import SplitMoments, add_inputs
    from layerwise.network.streaming import Batch

    convolution = nn.Conv2d(2, 3, 3, padding=1)
    pixels = random_inputs(4, 2, 6, 6)
    found = []
    for marked in (pixels, None):  # without pixels a batch is text, which never forms M
        moments = SplitMoments(frozenset())
        batch = Batch(torch.zeros(4, 1, dtype=torch.int64), None, marked)
        with observing(nn.Sequential(convolution), {"0": "0"}) as observer:
            given = pixels.clone().requires_grad_()
            output = convolution(given)
            add_inputs(moments, observer.seen, batch)
            directions = random_inputs(2, *output.shape)
            back_propagate(output, given, observer.seen, directions, moments, batch, False)
        found.append(moments.sites["0"])
    for side in ("left", "right"):
        torch.testing.assert_close(getattr(found[0], side), getattr(found[1], side), rtol=1e-4, atol=1e-3)
