"""Where per-site work runs: a fixed number of threads of this process.

Encoding spends its time in compiled loops and matrix products, both of which release the interpreter's lock, so
threads use every core, share the statistics without a copy, and leave no orphans when the process is killed. Each
unit runs single-threaded inside, so its bytes do not depend on how many run beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def single_threaded() -> Iterator[None]:
    """Matrix products of this process on one thread each, while site work runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def each(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """``work(item)`` for every item, results in the order of the items, ``workers`` at a time.

    On an error or an interrupt the units that have not begun are cancelled and the error is raised.
    """

    def unit(item: Item) -> Result:
        torch.set_num_threads(1)  # the setting is a thread's own
        with torch.inference_mode():
            return work(item)

    with single_threaded():
        if workers == 1:
            for item in items:
                yield unit(item)
            return
        with ThreadPoolExecutor(workers, thread_name_prefix="site") as pool:
            futures: list[Future[Result]] = [pool.submit(unit, item) for item in items]
            try:
                for future in futures:
                    yield future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
