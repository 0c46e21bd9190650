"""Workers: results in order whatever their number, errors that stop the rest, threads put back as they were."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from layerwise.engine.workers import each


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    def work(item: int) -> int:
        time.sleep(0.002 * (5 - item % 5))
        return item * item

    assert list(each(work, range(12), workers)) == [i * i for i in range(12)]


@pytest.mark.parametrize("workers", [1, 3])
def test_work_is_single_threaded_and_without_gradients(workers: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = list(each(lambda _: (torch.get_num_threads(), torch.is_grad_enabled()), range(4), workers))
        assert seen == [(1, False)] * 4
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_no_more_than_the_given_number_run_at_a_time() -> None:
    lock, running, most = threading.Lock(), [0], [0]

    def work(_: int) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.005)
        with lock:
            running[0] -= 1

    list(each(work, range(10), 2))
    assert most[0] == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_is_raised_and_the_rest_does_not_begin(workers: int) -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        time.sleep(0.005)
        if item == 1:
            raise ValueError("item 1")
        return item

    with pytest.raises(ValueError, match="item 1"):
        list(each(work, range(50), workers))
    time.sleep(0.02)
    assert len(begun) < 10


@pytest.mark.parametrize("workers", [1, 2])
def test_threads_are_put_back_after_an_error(workers: int) -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        list(each(lambda item: 1 // item, [0, 1], workers))
    assert torch.get_num_threads() == before


def test_the_number_of_workers_does_not_change_a_bit() -> None:
    draw = torch.Generator().manual_seed(0)
    matrices = [torch.randn(65, 65, generator=draw) for _ in range(6)]

    def work(matrix: torch.Tensor) -> torch.Tensor:
        return torch.linalg.cholesky(matrix @ matrix.T + 65 * torch.eye(65))

    results = [list(each(work, matrices, workers)) for workers in (1, 2, 3)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
