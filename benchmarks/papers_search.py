"""How well ``layerwise papers`` finds: mean average precision of full text, of meaning, and of both fused.

    python benchmarks/papers_search.py ../shared/catalogue/listings.json --network build/demo/minilm-4.5bpw

The file holds listings of a papers feed with the words they were about: a noisy relevance set of few queries, which
tells a broken search from a working one and little more. A paper that a ranking does not hold counts as not found.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import Table, add_output_options, publish

from layerwise.papers.catalogue import papers
from layerwise.papers.fulltext import by_full_text
from layerwise.papers.meaning import by_meaning, installed_network
from layerwise.papers.search import fuse


def average_precision(ranking: Sequence[int], relevant: Collection[int]) -> float:
    """Mean over the relevant of the precision at their rank; 0 for those that the ranking does not hold."""
    found, total = 0, 0.0
    for rank, index in enumerate(ranking, 1):
        if index in relevant:
            found += 1
            total += found / rank
    return total / len(relevant)


def measure(listings: Sequence[dict[str, Any]], network: Path | None) -> list[dict[str, Any]]:
    """A row for each listing, and their mean."""
    place = {paper.short: i for i, paper in enumerate(papers())}
    rows = []
    for listing in listings:
        relevant = {place[name] for name in listing["papers"]}
        text = by_full_text(listing["words"], papers())
        row: dict[str, Any] = {
            "words": listing["words"],
            "papers": len(relevant),
            "by chance": len(relevant) / len(place),
        }
        row["full text"] = average_precision(text, relevant)
        if network is not None:
            meaning = by_meaning(listing["words"], network)
            row["meaning"] = average_precision(meaning, relevant)
            row["both"] = average_precision(fuse(text, meaning), relevant)
        rows.append(row)
    figures = [name for name in rows[0] if name not in ("words", "papers")]
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in figures}
    return [*rows, {"words": "mean", "papers": None, **mean}]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("listings", type=Path, help="relevance lists: JSON with words and papers")
    parser.add_argument("--network", help="compressed MiniLM; the installed one by default")
    add_output_options(parser)
    given = parser.parse_args()
    if not given.listings.is_file():
        print(f"skipped: there are no relevance lists at {given.listings}")
        return 0
    listings = json.loads(given.listings.read_text(encoding="utf-8"))["listings"]
    network = installed_network(given.network)
    if network is None:
        print("full text alone: no compressed MiniLM is installed; run make demo or give --network\n")
    rows = measure(listings, network)
    publish(given, [Table.of("Average precision", rows)], {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
