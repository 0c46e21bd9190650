"""Ranked full text over the catalogue: SQLite's FTS5 in memory, BM25, built anew in milliseconds.

Words are stemmed (Porter) and joined by OR: a paper that has only some of them is ranked low rather than lost. A word
in the name or the title says more than one in the description, which the column weights express.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence

from layerwise.papers.catalogue import Paper

COLUMNS = {"short": 6.0, "title": 4.0, "family": 2.0, "core": 1.5, "claim": 1.0}
"""Column -> its weight in BM25."""


def by_full_text(words: str, papers: Sequence[Paper]) -> list[int]:
    """Indices of the papers that hold any of ``words``, best first; equal ranks in the order given."""
    # FTS5 has a query language; as quoted strings the words can be any text.
    asked = " OR ".join(f'"{word}"' for word in re.findall(r"\w+", words))
    if not asked:
        return []
    base = sqlite3.connect(":memory:")
    try:
        base.execute(f"CREATE VIRTUAL TABLE paper USING fts5({', '.join(COLUMNS)}, tokenize='porter unicode61')")
        base.executemany(
            f"INSERT INTO paper(rowid, {', '.join(COLUMNS)}) VALUES (?, ?, ?, ?, ?, ?)",
            [(i, p.short, p.title, p.family.label, p.core, p.claim or "") for i, p in enumerate(papers)],
        )
        weights = ", ".join(map(str, COLUMNS.values()))
        found = base.execute(
            f"SELECT rowid FROM paper WHERE paper MATCH ? ORDER BY bm25(paper, {weights}), rowid", (asked,)
        )
        return [row for (row,) in found]
    finally:
        base.close()
