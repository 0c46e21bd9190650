"""Statistics of a site on disk, for an act that encodes it again later."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerwise.calibrate.statistics import Importance, SiteStatistics, Use

SIDES = ("rows", "columns", "inputs", "absolute_mean")
OPTIONAL = ("gradient", "largest", "attention")
WEIGHTED = ("first", "second", "powers")  # of Importance


def save_statistics(file: Path, statistics: SiteStatistics) -> None:
    """Write all uses of a site; the file appears by one rename."""
    values: dict[str, Tensor] = {}
    for place, use in enumerate(statistics.uses):
        values |= {f"{place}/{side}": getattr(use, side).detach().contiguous().clone() for side in SIDES}
        for side in OPTIONAL:
            if (value := getattr(use, side)) is not None:
                values[f"{place}/{side}"] = value.detach().contiguous().clone()
        if use.importance is not None:
            values |= {f"{place}/{side}": getattr(use.importance, side).contiguous().clone() for side in WEIGHTED}
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
                importance=_importance(found, place),
                **{side: found.get(f"{place}/{side}") for side in OPTIONAL},
            )
            for place in places
        )
    )


def _importance(found: dict[str, Tensor], place: int) -> Importance | None:
    if f"{place}/{WEIGHTED[0]}" not in found:
        return None
    return Importance(*(found[f"{place}/{side}"] for side in WEIGHTED))
