"""The compiled loops that cut weights to a trellis against those compiled as they run: the same bits on every path."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layerwise.calibrate.statistics import SiteStatistics, Use
from layerwise.encoding.trellis import Trellis
from layerwise.kernels import cuts
from layerwise.kernels.library import VARIABLE, paths, why_absent
from layerwise.recipe import parse_technique

pytestmark = pytest.mark.skipif(not paths(), reason=f"no compiled kernels here: {why_absent()}")


@pytest.fixture(params=paths())
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def moment(size: int, seed: int) -> torch.Tensor:
    x = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / len(x)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("rows", "columns", "coupled"), [(100, 90, True), (33, 70, False), (5, 3, True), (64, 64, True)]
)
def test_codes_and_scales_are_the_same(
    path: str, bits: int, rows: int, columns: int, coupled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits))
    weight[rows // 2] = 0.0
    weight[0, 0] = 1e4
    of_rows = moment(rows, 1) if coupled else torch.rand(rows, generator=torch.Generator().manual_seed(0))
    of_columns = moment(columns, 2)
    encoder = parse_technique(f"trellis:bits={bits},group=32")
    found = []
    for wanted in (path, "off"):
        monkeypatch.setenv(VARIABLE, wanted)
        use = Use(of_rows, of_columns, of_columns, torch.ones(columns), 1.0, 1000)
        form = encoder.encode(weight, SiteStatistics((use,)))  # type: ignore[attr-defined]
        assert isinstance(form, Trellis)
        found.append(form)
    assert torch.equal(found[0].packed, found[1].packed)
    assert torch.equal(found[0].scales.stored, found[1].scales.stored)


def test_arrays_that_do_not_fit_are_refused() -> None:
    weight, change = np.zeros((8, 40), np.float32), np.zeros((8, 40))
    states, groups = np.zeros((8, 40), np.uint8), np.zeros(8, np.int64)
    scales, table, nothing = np.ones((1, 40), np.float32), np.zeros(256, np.float32), np.empty((0, 0))
    rest = (states, change, False, np.ones(40), nothing, nothing, nothing)
    with pytest.raises(ValueError, match="fit together"):
        cuts.cut_tile(
            paths()[0], weight, scales, groups, table, 6, np.eye(8), 0, 0, 40, np.zeros((8, 40)), *rest
        )  # fmt: skip
    with pytest.raises(ValueError, match="fit together"):
        cuts.cut_tile(
            paths()[0], weight, scales, groups, table, 4, np.eye(8), 0, 8, 40, np.zeros((8, 40)), *rest
        )  # fmt: skip
