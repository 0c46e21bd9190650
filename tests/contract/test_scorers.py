"""The laws that every registered scorer obeys."""

from __future__ import annotations

import math

import pytest
import torch

from layerwise.calibrate.statistics import SiteStatistics, Use
from layerwise.roles import Scorer
from layerwise.technique import find, names

pytestmark = pytest.mark.parametrize("name", names(Scorer))

ROWS, COLUMNS = 6, 9


def make(name: str) -> Scorer:
    scorer = find(name)()
    assert isinstance(scorer, Scorer)
    return scorer


def moment(width: int, rank: int, seed: int) -> torch.Tensor:
    values = torch.randn(rank, width, generator=torch.Generator().manual_seed(seed))
    return values.T @ values / rank


def use(rows: torch.Tensor, columns: torch.Tensor, inputs: torch.Tensor | None = None) -> Use:
    return Use(rows, columns, columns if inputs is None else inputs, torch.ones(COLUMNS), 0.1, 100)


STATISTICS = {
    "full": SiteStatistics((use(moment(ROWS, 40, 1), moment(COLUMNS, 40, 2), moment(COLUMNS, 40, 3)),)),
    "rank one": SiteStatistics((use(moment(ROWS, 1, 1), moment(COLUMNS, 1, 2)),)),
    "constant": SiteStatistics((use(torch.ones(ROWS, ROWS), torch.ones(COLUMNS, COLUMNS)),)),
    "zero": SiteStatistics((use(torch.zeros(ROWS, ROWS), torch.zeros(COLUMNS, COLUMNS)),)),
    "diagonal": SiteStatistics((use(torch.rand(ROWS), torch.rand(COLUMNS)),)),
    "tied": SiteStatistics((use(torch.ones(ROWS), moment(COLUMNS, 9, 4)), use(torch.ones(ROWS), torch.ones(COLUMNS)))),
    "unknown": SiteStatistics.uninformed(ROWS, COLUMNS),
}


def change(seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("statistics", STATISTICS.values(), ids=STATISTICS)
def test_no_change_scores_zero_and_every_score_is_finite(name: str, statistics: SiteStatistics) -> None:
    assert make(name).score(torch.zeros(ROWS, COLUMNS), statistics) == 0
    for made in (change(), torch.ones(ROWS, COLUMNS), change() * 1e4, change()[:, :1] @ torch.ones(1, COLUMNS)):
        found = make(name).score(made, statistics)
        assert math.isfinite(found) and found >= 0


@pytest.mark.parametrize("statistics", STATISTICS.values(), ids=STATISTICS)
def test_a_score_grows_with_the_change(name: str, statistics: SiteStatistics) -> None:
    scores = [make(name).score(change() * size, statistics) for size in (0.0, 0.5, 1.0, 3.0)]
    assert scores == sorted(scores)
    if scores[2] > 0:
        assert scores[3] == pytest.approx(9 * scores[2], rel=1e-3), "second order: three times the change"


def test_a_score_is_repeated_and_leaves_its_arguments(name: str) -> None:
    statistics, made = STATISTICS["full"], change()
    kept, rows = made.clone(), statistics.uses[0].rows.clone()
    assert make(name).score(made, statistics) == make(name).score(made, statistics)
    assert torch.equal(made, kept) and torch.equal(statistics.uses[0].rows, rows)
