"""Finding papers: full text and meaning fused by reciprocal rank, then filters.

    score(paper) = Σ over the rankings that hold it of 1 / (60 + its rank there)

Ranks, not scores, are fused: BM25 and cosines have no common unit. The constant is that of the original method
(G. Cormack et al., "Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning Methods", 2009).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerwise.papers.catalogue import Family, papers
from layerwise.papers.fulltext import by_full_text
from layerwise.papers.ledger import Entry, Status

CONSTANT = 60


@dataclass(frozen=True)
class Filters:
    """What a listing is narrowed to; None leaves a side open."""

    family: Family | None = None
    status: Status | None = None
    years: range | None = None
    undated: bool = False  # only papers whose date states no year

    def admit(self, entry: Entry) -> bool:
        assert entry.paper is not None
        year = entry.paper.year
        return (
            self.family in (None, entry.paper.family)
            and self.status in (None, entry.status)
            and (self.years is None or year in self.years)
            and not (self.undated and year is not None)
        )


def fuse(*rankings: Sequence[int]) -> list[int]:
    """One ranking of several by reciprocal rank; ties go to the smaller index."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, index in enumerate(ranking, 1):
            scores[index] = scores.get(index, 0.0) + 1 / (CONSTANT + rank)
    return sorted(scores, key=lambda index: (-scores[index], index))


def ranked(words: str, by_meaning: Sequence[int] | None) -> list[int]:
    """Indices into the catalogue, best first: full text alone, or fused with a ranking by meaning."""
    found = by_full_text(words, papers())
    return found if by_meaning is None else fuse(found, by_meaning)


def listed(entries: Sequence[Entry], filters: Filters, order: Sequence[int] | None, limit: int | None) -> list[Entry]:
    """The entries that the filters admit, in the order given (of the catalogue where there is none)."""
    chosen = [entries[i] for i in (range(len(entries)) if order is None else order)]
    return [entry for entry in chosen if filters.admit(entry)][:limit]
