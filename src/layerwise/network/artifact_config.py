"""``quantization_config`` of an artifact: a small versioned description of every encoded site.

    "quantization_config": {
      "quant_method": "layerwise",
      "format_version": 1,
      "sites": {
        "model.layers.0.self_attn.q_proj": {"encoded": {"form": "integer", "shape": [64, 64], "bits": 4, …}},
        "transformer.h.0.attn.c_attn":     {"encoded": {…}, "transposed": true}
      }
    }

``inputs`` (format version 2): the site multiplies quantized inputs, on the grid of ``encoding/inputs.py`` with this
spec; what the grid stores lies under ``<site>.input…``. A version 1 artifact multiplies floats everywhere.
``arrangement`` (format version 3): in which order and how often the stored blocks run (``arrangement.py``).
``depths`` (format version 4): for which tokens or texts the blocks run (``depths.py``).
``transposed``: the stored matrix is [out, in], the module's own parameter is [in, out].
``kernel``: the stored matrix is [out, in * kh * kw], the module's own parameter is a convolution's [out, in, kh, kw].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from layerwise.encoding.inputs import input_layout
from layerwise.errors import InputError
from layerwise.network.arrangement import Arrangement, parse_arrangement
from layerwise.network.depths import Depths, parse_depths

METHOD = "layerwise"
FORMAT_VERSION = 4
DEPTHS_VERSION = 4
ARRANGED_VERSION = 3
INPUTS_VERSION = 2
PLAIN_VERSION = 1  # written where no site needs more, so that older readers keep reading


@dataclass(frozen=True)
class StoredSite:
    """The spec of an encoded weight, how its module keeps it, and the spec of its inputs' grid."""

    spec: dict[str, Any]
    transposed: bool = False
    kernel: tuple[int, ...] | None = None
    inputs: dict[str, Any] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the module's own parameter."""
        rows, columns = self.spec["shape"]
        if self.kernel is not None:
            return (rows, columns // math.prod(self.kernel), *self.kernel)
        return (columns, rows) if self.transposed else (rows, columns)

    def as_kept(self, weight: Tensor) -> Tensor:
        """A decoded matrix in the module's own layout."""
        return weight.T.contiguous() if self.transposed else weight.reshape(self.shape)


def sites_config(
    sites: Mapping[str, StoredSite], arrangement: Arrangement | None = None, depths: Depths | None = None
) -> dict[str, Any]:
    """The JSON value of ``quantization_config``."""
    entries = {
        name: {
            "encoded": site.spec,
            **({"transposed": True} if site.transposed else {}),
            **({"kernel": list(site.kernel)} if site.kernel is not None else {}),
            **({"inputs": site.inputs} if site.inputs is not None else {}),
        }
        for name, site in sorted(sites.items())
    }
    version = INPUTS_VERSION if any(site.inputs is not None for site in sites.values()) else PLAIN_VERSION
    described: dict[str, Any] = {"quant_method": METHOD, "format_version": version, "sites": entries}
    if arrangement is not None:
        described |= {"format_version": ARRANGED_VERSION, "arrangement": arrangement.written()}
    if depths is not None:
        described |= {"format_version": DEPTHS_VERSION, "depths": depths.written()}
    return described


def stored_depths(config: object) -> Depths | None:
    """The depths in a ``quantization_config``, or None; raises ``InputError`` for damaged ones."""
    if not isinstance(config, Mapping) or config.get("quant_method") != METHOD or "depths" not in config:
        return None
    version = config.get("format_version")
    if type(version) is not int or version < DEPTHS_VERSION or "arrangement" in config:
        raise InputError(f"an artifact of format version {version} cannot have depths, nor beside an arrangement")
    return parse_depths(config["depths"])


def stored_arrangement(config: object) -> Arrangement | None:
    """The arrangement in a ``quantization_config``, or None; raises ``InputError`` for a damaged one."""
    if not isinstance(config, Mapping) or config.get("quant_method") != METHOD or "arrangement" not in config:
        return None
    version = config.get("format_version")
    if type(version) is not int or version < ARRANGED_VERSION:
        raise InputError(f"an artifact of format version {version} cannot have an arrangement")
    return parse_arrangement(config["arrangement"])


def parse_sites(config: Mapping[str, Any]) -> dict[str, StoredSite]:
    """The sites of a ``quantization_config``; raises ``InputError`` for another method, a newer version, damage."""
    if not isinstance(config, Mapping) or config.get("quant_method") != METHOD:
        raise InputError(
            f"the network is not a layerwise artifact: its quant_method is "
            f"{config.get('quant_method') if isinstance(config, Mapping) else None!r}"
        )
    version = config.get("format_version")
    if type(version) is not int or version < 1:
        raise InputError(f"the artifact's format_version must be a whole number, not {version!r}")
    if version > FORMAT_VERSION:
        raise InputError(
            f"the artifact has format version {version}, this layerwise reads up to {FORMAT_VERSION}; upgrade layerwise"
        )
    entries = config.get("sites")
    if not isinstance(entries, Mapping):
        raise InputError("the artifact's quantization_config has no sites")
    sites: dict[str, StoredSite] = {}
    for name, entry in entries.items():
        spec = entry.get("encoded") if isinstance(entry, Mapping) else None
        shape = spec.get("shape") if isinstance(spec, Mapping) else None
        if not isinstance(spec, Mapping) or not (
            isinstance(shape, list) and len(shape) == 2 and all(type(s) is int and s > 0 for s in shape)
        ):
            raise InputError(f"the artifact's site {name} does not say in which form it is encoded")
        if entry.get("transposed", False) not in (True, False):
            raise InputError(f"the artifact's site {name} must have transposed true or false")
        kernel = entry.get("kernel")
        if kernel is not None and not (
            isinstance(kernel, list)
            and kernel
            and all(type(side) is int and side > 0 for side in kernel)
            and shape[1] % math.prod(kernel) == 0
        ):
            raise InputError(f"the artifact's site {name} must have a kernel such as [3, 3] that divides its columns")
        inputs = entry.get("inputs")
        if inputs is not None:
            check_inputs(name, inputs, shape[1], version, kernel)
        sites[name] = StoredSite(
            dict(spec),
            bool(entry.get("transposed", False)),
            tuple(kernel) if kernel else None,
            None if inputs is None else dict(inputs),
        )
    return sites


def check_inputs(site: str, inputs: object, columns: int, version: int, kernel: object) -> None:
    """``InputError`` unless a site may have this grid for its inputs."""
    if version < INPUTS_VERSION or kernel is not None or not isinstance(inputs, Mapping):
        raise InputError(f"the artifact's site {site} cannot have quantized inputs in format version {version}")
    try:
        input_layout(inputs)
    except InputError as reason:
        raise InputError(f"the artifact's site {site}: {reason}") from None
    if inputs.get("columns", columns) != columns:
        raise InputError(f"the artifact's site {site} has {columns} inputs, but a grid for {inputs['columns']}")
