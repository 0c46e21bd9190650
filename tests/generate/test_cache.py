"""Stored keys and values: what rounding may cost, where they lie, and what they take."""

from __future__ import annotations

import pytest
import torch
from tests.generate.networks import network, prompts

from layerwise.errors import InputError
from layerwise.generate.cache import GROUPS, Cache, group_of
from layerwise.jobs.cache_quality import cache_quality


def some(rows: int = 2, count: int = 5, width: int = 48) -> torch.Tensor:
    draw = torch.Generator().manual_seed(count)
    return torch.randn(rows, 3, count, width, generator=draw) * torch.tensor([0.01, 1, 100])[:, None, None]


@pytest.mark.parametrize(("kind", "levels"), [("int8", 127.0), ("int4", 15.0)])
def test_each_number_is_off_by_half_a_step_at_most(kind: str, levels: float) -> None:
    cache, new = Cache(1, 9, kind), some()
    cache.starts = [2, 4]
    cache.update(new, -new, 0)
    for sign, stored in zip((1, -1), cache.read(0, 9), strict=True):
        for row, start in enumerate(cache.starts):
            error = (stored[row, :, start : start + 5] - sign * new[row]).abs()
            groups = new[row].unflatten(-1, (-1, group_of(48, kind)))
            span = groups.abs().amax(-1) if kind == "int8" else groups.amax(-1) - groups.amin(-1)
            bound = (0.502 * span / levels + 0.002 * groups.abs().amax(-1)).repeat_interleave(group_of(48, kind), -1)
            assert bool((error <= bound).all())


@pytest.mark.parametrize("kind", ["16", "int8", "int4"])
def test_what_is_written_again_is_what_was_there(kind: str) -> None:
    """A token's codes depend on it alone, so writing it with others, later, or twice gives the same."""
    new = some(1, 6)
    together, apart = Cache(1, 6, kind), Cache(1, 6, kind)
    together.starts = [0]
    together.update(new, new, 0)
    for place in (0, 1, 2, 3, 2, 3, 4, 5):
        apart.starts = [place]
        apart.update(new[:, :, place : place + 1], new[:, :, place : place + 1], 0)
    assert all(torch.equal(a, b) for a, b in zip(together.read(0, 6), apart.read(0, 6), strict=True))


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_extreme_values_stay_finite(kind: str, value: float) -> None:
    cache = Cache(1, 1, kind)
    cache.starts = [0]
    keys, _ = cache.update(torch.full((1, 1, 1, 32), value), torch.zeros(1, 1, 1, 32), 0)
    assert bool(torch.isfinite(keys).all()) and float((keys - value).abs().max()) <= max(1.01 * value, 1e-6)


def test_bytes_are_those_that_are_promised() -> None:
    sizes = {}
    for kind in ("16", "int8", "int4"):
        cache = Cache(1, 7, kind)
        cache.starts = [0]
        cache.update(some(1, 2, 64).half(), some(1, 2, 64).half(), 0)
        sizes[kind] = cache.nbytes / (2 * 3 * 7 * 64)
    assert sizes == {"16": 2.0, "int8": 1 + 2 / GROUPS["int8"], "int4": 0.5 + 4 / GROUPS["int4"]}


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(InputError, match="one of 16, int8, int4, not 'int3'"):
        Cache(1, 4, "int3")
    with pytest.raises(InputError, match="width 31"):
        group_of(31 * 2 - 31, "int4")
    with pytest.raises(ValueError, match="cannot take position 4"):
        cache = Cache(1, 4)
        cache.starts = [3]
        cache.update(some(1, 2), some(1, 2), 0)


def test_fewer_bits_lose_more() -> None:
    net = network("llama")
    windows = [torch.tensor([prompt]) for prompt in prompts(6, seed=2, longest=30)]
    found = {kind: cache_quality(net, net, windows, kind) for kind in ("16", "int8", "int4")}
    assert found["16"].metrics["kl"] < 1e-9 and found["16"].metrics["agreement"] == 1
    assert 50 * found["int8"].metrics["kl"] < found["int4"].metrics["kl"]
