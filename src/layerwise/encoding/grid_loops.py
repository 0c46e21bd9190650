"""The inner loops of rounding to grids and trellises: of the compiled library where it was built, else of ``loops.py``
and ``trellis_loops.py``.

Both give the same bits. The latter are compiled as the program runs, for which a compiler is loaded, a second and
130 MB; where every loop of a run comes from the library they are not.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerwise.kernels import cuts, grids
from layerwise.kernels.library import OFF, VARIABLE, paths

Array = NDArray[Any]


def native_path() -> str | None:
    """The path through the library that loops take; None where they are compiled as they run."""
    wanted, here = os.environ.get(VARIABLE, ""), paths()
    if wanted == OFF or not here:
        return None
    return wanted if wanted in here else here[0]


def best_candidates(
    weight: Array, importance: Array, step: Array, zero: Array, width: int, top: float, best: Array
) -> None:
    """See ``loops.best_candidates``."""
    if (path := native_path()) is not None:
        grids.best_candidates(path, weight, importance, step, zero, width, top, best)
        return
    from layerwise.encoding import loops

    loops.best_candidates(weight, importance, step, zero, width, top, best)


def nearest_codes(weight: Array, step: Array, zero: Array, width: int, top: float, codes: Array) -> None:
    """See ``loops.nearest_codes``; groups are ``width`` columns in order."""
    if (path := native_path()) is not None:
        grids.nearest_codes(path, weight, step, zero, width, top, codes)
        return
    from layerwise.encoding import loops

    loops.nearest_codes(weight, step, zero, np.arange(weight.shape[1]) // width, top, codes)


def round_columns(*given: Any) -> None:
    """See ``loops.round_columns``."""
    if (path := native_path()) is not None:
        grids.round_columns(path, *given)
        return
    from layerwise.encoding import loops

    loops.round_columns(*given)


def cut_tile(*given: Any) -> None:
    """See ``trellis_loops.cut_tile``."""
    if (path := native_path()) is not None:
        cuts.cut_tile(path, *given)
        return
    from layerwise.encoding import trellis_loops

    trellis_loops.cut_tile(*given)


def recut_tile(*given: Any) -> None:
    """See ``trellis_loops.recut_tile``."""
    if (path := native_path()) is not None:
        cuts.recut_tile(path, *given)
        return
    from layerwise.encoding import trellis_loops

    trellis_loops.recut_tile(*given)
