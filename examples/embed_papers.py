"""Make the vectors by which ``layerwise papers`` searches by meaning, with a MiniLM that layerwise compressed.

    make demo                                                # compresses MiniLM to build/demo/minilm-4.5bpw
    python examples/embed_papers.py build/demo/minilm-4.5bpw

Run it again when the catalogue changes; a test compares the digest of the catalogue that the file carries.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from layerwise.errors import InputError
from layerwise.papers.catalogue import papers
from layerwise.papers.meaning import VECTORS, encode, pack

PLACE = Path(__file__).resolve().parents[1] / "src" / "layerwise" / "papers" / VECTORS


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("network", type=Path, help="folder of the compressed network")
    parser.add_argument("--out", type=Path, default=PLACE, help="file to write; the package's own by default")
    given = parser.parse_args()
    try:
        content = pack(encode([paper.text for paper in papers()], given.network))
    except InputError as mistake:
        print(mistake, file=sys.stderr)
        return 2
    given.out.write_bytes(content)
    print(f"{given.out.name}: {len(papers())} papers, {len(content):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
