"""What a run ran on: versions of what computes, and the memory it took."""

from __future__ import annotations

import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version

COMPUTES = ("layerwise", "torch", "transformers", "numba", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python and of every package that decides the result."""
    found = {"python": platform.python_version()}
    for name in COMPUTES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree that is not installed
            found[name] = "source"
    return found


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
