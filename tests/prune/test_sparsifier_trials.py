"""What bench measures of every sparsifier: all its studies run, in bytes that are comparable, and repeat themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from layerwise.errors import InputError
from layerwise.jobs.bench import Bench, check
from layerwise.roles import Sparsifier
from layerwise.technique import names
from layerwise.trials.sparsifiers import METRICS, Study, rank_correlation, sparsifier_trials

SMALL = Study(
    images=150, dense=4, widths=(4, 6, 6), chain=(4, 6, 6), perceptron=(12, 8), unet=8, denoiser=3, candidates=4,
    rounds=1, options=(("steps", 2), ("taught", 1), ("students", 2), ("finish", 2), ("candidates", 3), ("devices", 3),
                       ("local", 1)),
)  # fmt: skip


@contextmanager
def silent(name: str, total: int) -> Iterator[Callable[[], None]]:
    yield lambda: None


@pytest.mark.parametrize("name", names(Sparsifier))
def test_every_sparsifier_is_measured_beside_its_rivals(name: str) -> None:
    pytest.importorskip("sklearn")
    found = sparsifier_trials(name, 0, silent, SMALL)
    assert found and all(trial.figures is not None and trial.figures.metric in METRICS for trial in found)
    assert {trial.setting.recipe for trial in found} - {trial.baseline.recipe for trial in found}
    for trial in found:
        assert trial.setting.bytes > 0 and trial.baseline.bytes > 0 and trial.figures is not None and trial.figures.data
        if "magnitude" in trial.baseline.recipe and trial.setting.bytes > 300:  # else masks alone are larger
            assert trial.baseline.bytes <= trial.setting.bytes


def test_bench_takes_no_network_for_them() -> None:
    assert check(Bench("ssvi")).name == "ssvi"
    with pytest.raises(InputError, match="networks of its own"):
        check(Bench("ssvi", "a", "b", "c"))


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3], [10, 30, 90]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
