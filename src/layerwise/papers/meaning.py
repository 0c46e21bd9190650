"""Search by meaning: the vectors of all papers, and the small network that encodes a query when it is installed.

The vectors ship with the package: all-MiniLM-L6-v2, compressed by layerwise to 4.5 bits per weight, read every paper,
and its unit vectors are stored as int8 with a scale each (``examples/embed_papers.py`` makes the file). A query has
to be encoded by a network of the same kind. Whether it is one is not believed but tested: it encodes one of the
papers again, and must come near the vector that is stored.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from layerwise.errors import InputError
from layerwise.papers.catalogue import catalogue_bytes, papers

if TYPE_CHECKING:
    import numpy as np

VECTORS = "vectors.safetensors"
NETWORK = "minilm-4.5bpw"
VARIABLE = "LAYERWISE_PAPERS_NETWORK"
LONGEST = 256  # tokens of a text
SAME = 0.9  # cosine to a stored vector from which on a network counts as the one that made it


def installed_network(given: str | None = None) -> Path | None:
    """The folder of the network that encodes queries, or None.

    given: ``--network``; else the environment variable, else the demo's artifact below the working directory, else
    the user's cache folder. Raises ``InputError`` where a folder is named that holds no artifact.
    """
    named = given or os.environ.get(VARIABLE)
    if named:
        if not (Path(named) / "model.safetensors").is_file():
            source = "--network" if given else VARIABLE
            raise InputError(f"{source} must name a folder written by layerwise compress, and {named!r} is none")
        return Path(named)
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    places = (Path("build") / "demo" / NETWORK, cache_home / "layerwise" / NETWORK)
    return next((place for place in places if (place / "model.safetensors").is_file()), None)


def by_meaning(words: str, network: Path) -> list[int]:
    """Indices of all papers, those nearest in meaning first. Raises ``InputError`` for a network of another kind."""
    import numpy as np

    stored = vectors()
    query, again = encode([words, papers()[0].text], network)
    if again.shape != stored[0].shape or float(again @ stored[0]) < SAME:
        raise InputError(
            f"{network} does not encode texts as the network that made the papers' vectors does; "
            f"give an all-MiniLM-L6-v2 that layerwise compressed"
        )
    return [int(i) for i in np.argsort(-(stored @ query), kind="stable")]


def neighbours(count: int) -> list[list[int]]:
    """For each paper the ``count`` others that are nearest in meaning, nearest first."""
    import numpy as np

    likeness = vectors() @ vectors().T
    np.fill_diagonal(likeness, -np.inf)
    return [[int(i) for i in row[:count]] for row in np.argsort(-likeness, axis=1, kind="stable")]


@cache
def vectors() -> np.ndarray:
    """Unit vectors of the papers, ``[papers, width]`` float32."""
    import numpy as np
    from safetensors.numpy import load

    stored = load((files("layerwise.papers") / VECTORS).read_bytes())
    decoded = stored["vectors"].astype(np.float32) * stored["scales"][:, None]
    unit: np.ndarray = decoded / np.linalg.norm(decoded, axis=1, keepdims=True)
    return unit


def encode(texts: Sequence[str], network: Path) -> np.ndarray:
    """Mean-pooled unit vectors of texts, ``[texts, width]`` float32, by the BERT encoder of an artifact."""
    import numpy as np
    from tokenizers import Tokenizer

    from layerwise.papers.bert import Bert

    encoder = Bert(network)
    if not (network / "tokenizer.json").is_file():
        raise InputError(f"{network} has no tokenizer.json, without which no words can be encoded")
    tokenizer = Tokenizer.from_file(str(network / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    return np.stack([encoder.vector(tokenizer.encode(text).ids).numpy() for text in texts])


def pack(unit: np.ndarray) -> bytes:
    """The file of vectors: int8 codes ``[papers, width]``, a float32 scale each, and the catalogue they are of."""
    import numpy as np
    from safetensors.numpy import save

    scales = np.abs(unit).max(axis=1) / 127
    codes = np.rint(unit / scales[:, None]).astype(np.int8)
    return save({"scales": scales.astype(np.float32), "vectors": codes}, metadata={"catalogue": catalogue_digest()})


def catalogue_digest() -> str:
    return hashlib.sha256(catalogue_bytes()).hexdigest()
