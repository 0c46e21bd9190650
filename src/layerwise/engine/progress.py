"""How long work tells what it is doing: a stage, how far it is, and (where shown) the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """``with progress.stage("forward pass", 12) as advance: … advance()``"""

    def stage(self, name: str, total: int) -> AbstractContextManager[Callable[[], None]]: ...

    def note(self, text: str) -> None:
        """Say one thing that the user should know before the work goes on."""


class Stopwatch:
    """Silent progress that keeps the seconds of every stage; wraps another progress that shows them."""

    def __init__(self, shown: Progress | None = None) -> None:
        self.shown = shown
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        began = time.perf_counter()
        try:
            if self.shown is None:
                yield lambda: None
            else:
                with self.shown.stage(name, total) as advance:
                    yield advance
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def note(self, text: str) -> None:
        if self.shown is not None:
            self.shown.note(text)
