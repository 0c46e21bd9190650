"""Statistics of a site on disk, for an act that encodes it again later."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics, Use

SIDES = ("rows", "columns", "inputs", "absolute_mean")


def save_statistics(file: Path, statistics: SiteStatistics) -> None:
    """Write all uses of a site; the file appears by one rename."""
    values: dict[str, Tensor] = {}
    for place, use in enumerate(statistics.uses):
        values |= {f"{place}/{side}": getattr(use, side).detach().contiguous().clone() for side in SIDES}
        values[f"{place}/scale"] = torch.tensor(use.scale, dtype=torch.float64)
        values[f"{place}/tokens"] = torch.tensor(use.tokens)
    part = file.with_suffix(".part")
    save_file(values, part)
    part.replace(file)


def load_statistics(file: Path) -> SiteStatistics:
    """What ``save_statistics`` wrote."""
    found = load_file(file)
    places = sorted({int(name.partition("/")[0]) for name in found})
    return SiteStatistics(
        tuple(
            Use(
                **{side: found[f"{place}/{side}"] for side in SIDES},
                scale=float(found[f"{place}/scale"]),
                tokens=int(found[f"{place}/tokens"]),
            )
            for place in places
        )
    )
