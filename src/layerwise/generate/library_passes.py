"""The passes of a session that the compiled library runs: runs of blocks, and the scores behind them, one call each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwise.kernels.decoder import Decoding

if TYPE_CHECKING:
    from layerwise.generate.library_blocks import LibraryBlocks
    from layerwise.generate.session import Session


class LibraryPasses:
    """Of one session, over its cache. What the network is made of is looked at when the session begins."""

    def __init__(self, session: Session, found: LibraryBlocks, int8: bool) -> None:
        assert found.decoder is not None
        self.session, self.found, self.int8 = session, found, int8
        self.decoder = found.decoder
        self.whole = len(found.places) == len(session.network.blocks)
        self._decoding: Decoding | None = None

    @staticmethod
    def of(session: Session) -> LibraryPasses | None:
        """None where the library runs none of the blocks."""
        found = session.network.library_blocks()
        int8 = found.int8() if found.decoder is not None else None
        return None if int8 is None else LibraryPasses(session, found, int8)

    def takes(self, hidden: Tensor) -> bool:
        return self.found.takes(hidden, self.int8)

    def run(self, hidden: Tensor, blocks: Iterable[int], starts: Sequence[int]) -> Tensor:
        """``Session.run``; blocks that are not the library's run by torch in between."""
        for run, index in self.found.runs(blocks):
            if run is None:
                hidden = self.session.run_by_torch(hidden, (index,), starts)
            else:
                hidden = self._over(hidden).run(hidden, run, starts, int8=self.int8)
        return hidden

    def scores(self, hidden: Tensor, starts: Sequence[int]) -> Tensor | None:
        """Scores behind all blocks; None where they are not all the library's."""
        if not self.whole or self.decoder.head is None or not self.takes(hidden):
            return None
        return self._over(hidden).scores(hidden, starts, int8=self.int8)

    def head(self, hidden: Tensor) -> Tensor | None:
        """Scores of hidden states behind any block; None where norm and head are torch's."""
        if self.decoder.head is None or not self.takes(hidden):
            return None
        return self.decoder.scores(hidden, int8=self.int8)

    def _over(self, hidden: Tensor) -> Decoding:
        if self._decoding is None:
            shape, session = self.decoder.shape, self.session
            like = torch.empty(session.rows, shape.groups, 0, shape.dim)
            caches = [session.cache.plain(block, like) for block in self.found.places]
            keys, values = ([pair[i] for pair in caches if pair is not None] for i in (0, 1))
            self._decoding = self.decoder.over(keys, values, session.turns(hidden))
        return self._decoding
