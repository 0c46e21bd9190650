"""Every stored form by the name that its ``spec`` carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from layerwise.encoding.binary import Binary
from layerwise.encoding.centred import Centred
from layerwise.encoding.codebook import Codebook
from layerwise.encoding.dense import Dense
from layerwise.encoding.dictionary import Dictionary
from layerwise.encoding.directed import Directed
from layerwise.encoding.encoded import Encoded
from layerwise.encoding.integer import GroupedInteger
from layerwise.encoding.kronecker import Kronecker
from layerwise.encoding.lowrank import LowRank
from layerwise.encoding.mixed import Mixed
from layerwise.encoding.outliers import Outliers
from layerwise.encoding.power import Power
from layerwise.encoding.scattered import Scattered
from layerwise.encoding.sparse import Sparse
from layerwise.encoding.split import Split
from layerwise.encoding.sums import Sum
from layerwise.encoding.superblocks import Superblock
from layerwise.encoding.ternary import Ternary
from layerwise.encoding.trellis import Trellis
from layerwise.errors import InputError, nearest

FORMS: dict[str, type[Encoded]] = {
    form.form: form
    for form in (
        Dense,
        GroupedInteger,
        Codebook,
        LowRank,
        Sum,
        Sparse,
        Outliers,
        Scattered,
        Directed,
        Mixed,
        Ternary,
        Trellis,
        Centred,
        Binary,
        Split,
        Power,
        Kronecker,
        Dictionary,
        Superblock,
    )
}


def restore_form(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Encoded:
    """The stored form that ``spec`` and ``tensors`` (suffix -> tensor) describe; ``InputError`` on any misfit."""
    name = spec.get("form") if isinstance(spec, Mapping) else None
    if not isinstance(name, str) or name not in FORMS:
        raise InputError(f"there is no stored form named {name!r}{nearest(str(name), list(FORMS))}")
    return FORMS[name].restore(spec, tensors)
