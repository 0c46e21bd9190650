"""RepQuant, part A: the same codes under one scale as under a scale per channel, and the same function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics, Use
from layerwise.errors import InputError
from layerwise.network.folds import BlockScope, Fold
from layerwise.quantize.repquant import Repquant, channel_grid, ratios, reparametrised

WIDTH, OUT, BITS = 32, 12, 8


class Case:
    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(4)
        self.hat = torch.randn(300, WIDTH, generator=draw, dtype=torch.float64)
        self.gain = torch.rand(WIDTH, generator=draw, dtype=torch.float64) * 3 + 0.1
        self.bias = torch.randn(WIDTH, generator=draw, dtype=torch.float64)
        self.weight = torch.randn(OUT, WIDTH, generator=draw, dtype=torch.float64)
        self.own = torch.randn(OUT, generator=draw, dtype=torch.float64)
        self.given = self.hat * self.gain + self.bias
        self.low, self.high = self.given.amin(0), self.given.amax(0)


def codes(y: Tensor, step: Tensor | float, zero: Tensor | float) -> Tensor:
    return ((y / step).round() + zero).clamp(0, 2**BITS - 1)


def test_the_codes_under_one_scale_are_those_under_a_scale_per_channel() -> None:
    case = Case()
    made = reparametrised(case.gain, case.bias, [(case.weight, case.own)], case.low, case.high, BITS)
    steps, zeros = channel_grid(case.low, case.high, BITS)
    new = case.hat * made.gain + made.bias
    before, after = codes(case.given, steps, zeros), codes(new, made.step, made.zero)
    assert torch.equal(before, after)
    (weight, own) = made.readers[0]
    decoded = ((before - zeros) * steps) @ case.weight.T + case.own
    assert torch.allclose(((after - made.zero) * made.step) @ weight.T + own, decoded, atol=1e-12)


def test_without_rounding_the_function_stays_and_needs_the_shift() -> None:
    case = Case()
    made = reparametrised(case.gain, case.bias, [(case.weight, case.own)], case.low, case.high, BITS)
    weight, own = made.readers[0]
    wanted = case.given @ case.weight.T + case.own
    assert torch.allclose((case.hat * made.gain + made.bias) @ weight.T + own, wanted, atol=1e-12)
    assert not torch.allclose((case.hat * made.gain + case.bias / ratios_of(case)) @ weight.T + own, wanted, atol=1e-2)


def ratios_of(case: Case) -> Tensor:
    return ratios(channel_grid(case.low, case.high, BITS)[0])


def test_one_scale_without_it_loses_what_it_keeps() -> None:
    """The paper's point: per-tensor activations as good as per-channel ones."""
    case = Case()
    steps, zeros = channel_grid(case.low, case.high, BITS)
    step, zero = channel_grid(case.low.amin(), case.high.amax(), BITS)
    wanted = case.given @ case.weight.T

    def error(step: Tensor, zero: Tensor) -> float:
        rounded = (codes(case.given, step, zero) - zero) * step
        return float((rounded @ case.weight.T - wanted).norm() / wanted.norm())

    assert error(steps, zeros) < 0.7 * error(step, zero)


def test_a_range_must_be_one() -> None:
    case = Case()
    with pytest.raises(InputError, match="every channel needs a range"):
        reparametrised(case.gain, case.bias, [], case.high, case.low, BITS)


def test_as_a_rewrite_every_channel_behind_a_norm_is_as_wide() -> None:
    case = Case()
    x = case.given.float()
    x[:, 5] = 0
    moment = x.T @ x / len(x)
    use = Use(torch.ones(OUT), moment, moment, x.abs().mean(0), 1.0, len(x))
    fit = {"q": SiteStatistics((use,))}
    parameters = {"norm.weight": case.gain.float(), "norm.bias": case.bias.float(), "q.weight": case.weight.float()}
    scope = BlockScope("block.0", parameters, frozenset(), fit, dict(fit), (Fold("norm", ("q",)),))
    after = Repquant().rewrite(scope)
    spread = after.fit["q"].inputs.diagonal().sqrt()
    alive = torch.arange(WIDTH) != 5
    assert torch.allclose(spread[alive], spread[alive].mean().expand(WIDTH - 1), rtol=1e-4)
    y = case.hat.float() * after.parameters["norm.weight"] + after.parameters["norm.bias"]
    wanted = case.given.float() @ parameters["q.weight"].T
    assert torch.allclose(y @ after.parameters["q.weight"].T, wanted, rtol=1e-4, atol=1e-4)
