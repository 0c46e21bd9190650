"""What is derived from one tensor, once for all the sites that are given it.

Queries, keys and values see the same inputs, and so do the gate and the up matrix: ``calibrate.reverse.add_inputs``
gives them one second moment. A factor of it is the same for each of them. It is made for the first encoding that asks
and let go of with the last of the group. Where the sites of a group follow one another, as those of attention do, no
more factors are in memory than without sharing: one for each site that is being encoded. Where others lie between
(the third matrix of some experts), one more waits meanwhile.

A group is what holds the very same tensor, not an equal one: what a rewrite scales is a tensor of its own, and so is
what is summed over several uses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock

from layerwise.calibrate.statistics import Shared, SiteStatistics


class SharedInputs:
    """The groups of sites with the same inputs, over the encodings to come: one entry of ``coming`` for each."""

    def __init__(self, coming: Iterable[SiteStatistics]) -> None:
        self._left = Counter(key for statistics in coming if (key := _key(statistics)) is not None)
        self._groups: dict[int, Shared] = {}
        self._lock = Lock()

    @contextmanager
    def of(self, statistics: SiteStatistics) -> Iterator[SiteStatistics]:
        """One encoding: the statistics with their group's place, where another encoding has the same inputs."""
        key = _key(statistics)
        with self._lock:
            if key in self._groups:
                shared = self._groups[key]
            elif key is not None and self._left[key] > 1:
                shared = self._groups[key] = Shared(statistics.uses[0].inputs)
            else:
                shared = None
        try:
            yield statistics if shared is None else replace(statistics, shared=shared)
        finally:
            with self._lock:
                if key is not None:
                    self._left[key] -= 1
                    if self._left[key] <= 0:
                        self._groups.pop(key, None)

    def __len__(self) -> int:
        """Groups that something is kept of."""
        return len(self._groups)


def _key(statistics: SiteStatistics) -> int | None:
    """Which tensor the inputs are; None for a sum over uses, or a diagonal, of which nothing costly is derived."""
    inputs = statistics.uses[0].inputs
    return id(inputs) if len(statistics.uses) == 1 and inputs.dim() == 2 else None
