"""Memory that was freed goes back to the system between blocks.

The C library keeps what is freed for the next request, in a pool for each thread. A run that works block after block
would carry the largest of every pool along, and the resident set would tell of the past instead of the present. Large
tensors are best kept out of the pools altogether: the library begins with that and gives it up as soon as one is freed.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from functools import cache

LARGE = 8 << 20  # bytes; smaller tensors come and go too often to be asked of the system each time
LARGEST = 32 << 20  # what the library may go up to by itself
KEPT = 32 << 20  # bytes at the end of each pool that are kept between tensors
KEPT_FOR_REUSE = 64 << 20
MMAP_THRESHOLD, TRIM_THRESHOLD, ARENA_MAX = -3, -1, -8  # of malloc.h


@contextlib.contextmanager
def large_apart() -> Iterator[None]:
    """Have every large tensor taken from the system and returned to it when it is freed, where glibc allocates.

    A page that comes new from the system is cleared first: a compression of MiniLM takes an eighth longer where tensors
    from 2 MiB on are asked of the system, and nothing is kept between others. Afterwards the largest are kept again, as
    in any program that has worked with such tensors: it is faster.
    """
    _set_threshold(LARGE)
    _set(TRIM_THRESHOLD, KEPT)
    try:
        yield
    finally:
        _set_threshold(LARGEST)


@contextlib.contextmanager
def reused() -> Iterator[None]:
    """Within ``large_apart``, while the same few sizes come and go: what is freed is kept for the next tensor.

    Clearing its pages takes as long as a norm or an activation function does. At the end everything free is returned.
    """
    _set_threshold(LARGEST)
    _set(TRIM_THRESHOLD, KEPT_FOR_REUSE)
    try:
        yield
    finally:
        _set_threshold(LARGE)
        _set(TRIM_THRESHOLD, KEPT)
        give_back()


def one_pool() -> None:
    """Have all threads of this process share one pool, before there are any: for a process that is ours alone.

    Threads that come and go with the blocks would leave free memory at the ends of pools of their own, where neither
    another thread finds it nor ``give_back``.
    """
    _set(ARENA_MAX, 1)


def _set_threshold(size: int) -> None:
    _set(MMAP_THRESHOLD, size)


def _set(option: int, value: int) -> None:
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(option, value)


def give_back() -> None:
    """Return freed memory to the system where the C library can (glibc); elsewhere nothing happens."""
    if (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    except (AttributeError, OSError, TypeError):
        return None
