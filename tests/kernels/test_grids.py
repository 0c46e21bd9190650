"""The compiled loops of encoders against those that are compiled as they run: the same bits on every path."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from layerwise.encoding import grid_loops, loops
from layerwise.encoding.grid import Grid, fit_grid, round_to_grid
from layerwise.kernels import grids
from layerwise.kernels.library import VARIABLE, paths, why_absent
from layerwise.quantize._rounding import one_sided

pytestmark = pytest.mark.skipif(not paths(), reason=f"no compiled kernels here: {why_absent()}")


@pytest.fixture(params=paths())
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    w[rows // 2] = 0.0
    w[0, 0], w[-1, -1] = 1e4, -3e-6
    return w


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(5, 64, 16), (37, 172, 64), (3, 7, 0), (1, 1, 64), (65, 130, 32)]
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_and_grids_are_the_same(
    path: str, bits: int, rows: int, columns: int, group: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, x = weights(rows, columns), weights(3 * columns, columns, 1)
    found: dict[str, Any] = {}
    for wanted in (path, "off"):
        monkeypatch.setenv(VARIABLE, wanted)
        grid = Grid(bits, group, symmetric)
        fitted = fit_grid(w, grid, clip=True, importance=x.square().mean(0))
        rounded = one_sided(w, x.T @ x / len(x), grid, clip=True, damp=0.01, act_order=True)
        found[wanted] = (fitted.scale, fitted.zeros(), round_to_grid(w, fitted), rounded.packed)
    for mine, theirs in zip(found[path], found["off"], strict=True):
        assert torch.equal(mine, theirs)


def test_what_a_tile_leaves_behind_is_the_same(path: str) -> None:
    """Not only codes: the errors and what they send to the columns on the left, of a tile inside the matrix."""
    n, m, width = 12, 70, 5
    random = np.random.default_rng(0)
    weight, step = random.normal(size=(n, m)).astype(np.float32), np.full((3, m), 0.3, np.float32)
    zero, group_of = np.full((3, m), 3.0, np.float32), np.arange(n) // 4
    lower, carried = random.normal(size=(width, width)), random.normal(size=(width, m))
    results = []
    for run in (loops.round_columns, lambda *given: grids.round_columns(path, *given)):
        codes, change, sent = np.zeros((n, m), np.uint8), np.zeros((n, m)), carried.copy()
        run(weight, step, zero, group_of, 7.0, lower, 4, 11, 40, sent, codes, change)
        results.append((codes, change, sent))
    for mine, theirs in zip(*results, strict=True):
        assert mine.tobytes() == theirs.tobytes()
    assert not results[0][0][:4].any() and not results[0][0][:, :11].any()


def test_arrays_that_do_not_fit_are_refused(path: str) -> None:
    w, one = np.zeros((4, 8), np.float32), np.ones((4, 2), np.float32)
    codes = np.zeros((4, 8), np.uint8)
    with pytest.raises(ValueError, match="fit together"):
        grids.nearest_codes(path, w, one, one, 3, 15.0, codes)
    with pytest.raises(ValueError, match="fit together"):
        grids.nearest_codes(path, w, one, one[:3], 4, 15.0, codes)
    with pytest.raises(ValueError, match="whole arrays"):
        grids.nearest_codes(path, np.zeros((8, 4), np.float32).T, one, one, 4, 15.0, codes)
    with pytest.raises(ValueError, match="whole arrays"):
        grids.nearest_codes(path, w.astype(np.float64), one, one, 4, 15.0, codes)
    with pytest.raises(RuntimeError, match="no path"):
        grids.nearest_codes("none", w, one, one, 4, 15.0, codes)


def test_off_means_compiled_as_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    assert grid_loops.native_path() is None
    monkeypatch.delenv(VARIABLE)
    assert grid_loops.native_path() == paths()[0]
