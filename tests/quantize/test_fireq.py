"""FireQ: 8-bit float steps, the guard against underflow, and what both are worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.encoding.float8 import TOP_CODE, float8_above, float8_values, guarded_power
from layerwise.encoding.forms import restore_form
from layerwise.encoding.grid import Grid, fit_grid
from layerwise.errors import InputError
from layerwise.recipe import parse_technique


def normal(sigma: float, rows: int = 64, columns: int = 256) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * sigma


def relative(options: str, weight: Tensor, site: Any) -> float:
    encoded = parse_technique(f"fireq:{options}").encode(weight, site(torch.ones(len(weight)), torch.ones(256)))
    return float((encoded.decode() - weight).square().sum() / weight.square().sum())


def test_the_numbers_are_those_of_the_float_type() -> None:
    codes = torch.arange(TOP_CODE + 1, dtype=torch.uint8)
    assert torch.equal(float8_values(codes), codes.view(torch.float8_e4m3fn).float())
    assert float8_values(codes).max() == 448 and float8_values(codes[1:]).min() == 2.0**-9


def test_steps_are_rounded_upwards_to_the_next_number() -> None:
    wanted = torch.rand(2000, generator=torch.Generator().manual_seed(1)) * 447
    codes = float8_above(wanted)
    assert bool((float8_values(codes) >= wanted).all()) and bool((float8_values(codes - 1) < wanted).all())
    assert torch.equal(float8_above(float8_values(codes)), codes)
    assert float8_above(torch.tensor([0.0, 1e-9, 1e9])).tolist() == [1, 1, TOP_CODE]


def test_the_power_is_the_first_at_which_least_is_lost() -> None:
    for steps, power in (([1.0, 2.0], 0), ([2.0**-6], 0), ([2.0**-7], 1), ([2.0**-9, 4.0], 3), ([2.0**-30], 14)):
        assert guarded_power(torch.tensor(steps), 8).item() == 2.0**-power
    assert guarded_power(torch.tensor([2.0**-9, 16.0]), 8).item() == 0.5  # further up, 16 * 8 would pass 448
    assert guarded_power(torch.tensor([100.0]), 8).item() == 2.0  # even i = 0 is too large
    assert guarded_power(torch.zeros(3), 8).item() == 1.0


@pytest.mark.parametrize("sigma", [0.002, 0.02, 0.2])
def test_ablation_the_guard_is_what_keeps_small_weights(sigma: float, site: Any) -> None:
    weight = normal(sigma)
    options = "group=128,search=false"
    guarded, bare = relative(options, weight, site), relative(f"{options},guard=false", weight, site)
    plain = parse_technique("rtn:bits=4,group=128,symmetric=true,clip=false")
    exact = plain.encode(weight, site(torch.ones(64), torch.ones(256))).decode()  # type: ignore[attr-defined]
    floor = float((exact - weight).square().sum() / weight.square().sum())
    assert guarded < 1.2 * floor  # steps rounded up to one of eight numbers an octave
    if sigma == 0.002:
        assert bare > 4 * guarded
    assert bare >= 0.999 * guarded


def test_the_power_changes_no_code_where_nothing_underflows() -> None:
    weight = normal(1.0, 8)
    grid = Grid(4, 64, symmetric=True, scale_bits=8, float_scale=True)
    for power in (1.0, 0.5, 0.25):
        fitted = fit_grid(weight, grid, power=torch.tensor([power]).half())
        torch.testing.assert_close(fitted.steps(), fit_grid(weight, grid).steps(), rtol=0, atol=0)


def test_bytes_and_what_is_refused() -> None:
    encoded = parse_technique("fireq:group=128").encode(normal(0.02), known())  # type: ignore[attr-defined]
    assert encoded.nbytes == 64 * 256 // 2 + 64 * 2 + 2  # 4 + 8 / 128 bits a weight, and the power
    spec, tensors = encoded.spec(), encoded.tensors()
    assert torch.equal(restore_form(spec, tensors).decode(), encoded.decode())
    bad = [
        ({**spec, "float_scale": value}, tensors) for value in (False, 1, None, "yes")
    ] + [
        ({**spec, "scale_bits": 16}, tensors),
        (spec, {**tensors, "_scale": torch.full_like(tensors["_scale"], 127)}),
        (spec, {**tensors, "_scale": torch.zeros_like(tensors["_scale"])}),
        (spec, {**tensors, "_scale_factor": torch.tensor([0.75]).half()}),
        (spec, {**tensors, "_scale_factor": torch.tensor([-0.5]).half()}),
        (spec, {**tensors, "_scale_factor": torch.ones(64).half()}),
    ]  # fmt: skip
    for bad_spec, bad_tensors in bad:
        with pytest.raises(InputError):
            restore_form(bad_spec, bad_tensors)


def known() -> Any:
    from layerwise.calibrate.statistics import SiteStatistics

    return SiteStatistics.uninformed(64, 256)
