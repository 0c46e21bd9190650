"""Which stored forms of an artifact an engine takes as they are, and which must be rounded to a grid that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from layerwise.encoding.encoded import Encoded
from layerwise.encoding.grid import Grid
from layerwise.errors import InputError
from layerwise.export.regrid import nearest_grid, regridded
from layerwise.network.artifact import Artifact
from layerwise.network.sites import Site
from layerwise.plan.fused import groups_among
from layerwise.plan.targets import Target, described


@dataclass(frozen=True)
class Rounded:
    """A site that changes: what it was, and the grid that it gets (None: 16 bits), in words."""

    before: str
    after: str


@dataclass(frozen=True)
class Fitting:
    """An artifact as an engine will have it. ``grids``: site -> its new grid, None for 16 bits; others stay."""

    artifact: Artifact
    sites: Mapping[str, Site]
    target: Target
    grids: Mapping[str, Grid | None]

    def encoded(self, name: str) -> Encoded:
        """What is exported of a site; a site of ``dense`` is decoded by who writes it."""
        form = self.artifact.encoded(name)
        grid = self.grids.get(name)
        return form if grid is None else regridded(form, grid)

    def dense(self, name: str) -> bool:
        """Whether a site is written at 16 bits."""
        return name not in self.artifact.sites or (name in self.grids and self.grids[name] is None)

    def changed(self) -> dict[str, Rounded]:
        """What was rounded, for the warning."""
        return {
            name: Rounded(described(self.artifact.specs[name]), "16 bits" if grid is None else str_of(grid))
            for name, grid in self.grids.items()
        }


def refusals(artifact: Artifact, sites: Mapping[str, Site], target: Target) -> dict[str, str]:
    """Site -> why the engine cannot take it as it is."""
    found = {}
    for name, stored in artifact.sites.items():
        if stored.inputs is not None:
            raise InputError(f"{name} multiplies quantized inputs, which only layerwise runs; export without them")
        reason = target.refusal(stored.spec, sites[name])
        if reason is not None:
            found[name] = f"{name} has {described(stored.spec)}; {reason}"
    return found


def unequal(formats: Mapping[str, str], target: Target) -> dict[str, str]:
    """First site of each group that the engine fuses -> why it cannot, where formats (site -> words) differ."""
    found = {}
    for names in groups_among(formats, target):
        if len({formats[name] for name in names}) > 1:
            listed = ", ".join(f"{name.rpartition('.')[2]} {formats[name]}" for name in names)
            found[names[0]] = f"{names[0].rpartition('.')[0]} has {listed}; {target.name} multiplies them as one matrix"
    return found


def fit(artifact: Artifact, sites: Mapping[str, Site], target: Target, formats: Mapping[str, str]) -> Fitting:
    """Round what the engine does not take: to the nearest grid, and where sites are fused to one grid for all.

    formats: site -> its format in words, of sites at 16 bits too.
    """
    wrong = refusals(artifact, sites, target)
    grids: dict[str, Grid | None] = {}

    def nearest(name: str) -> Grid | None:
        offered, spec = target.grids(sites[name]), artifact.specs[name]
        return nearest_grid(spec, artifact.bytes_of(name), offered, target.short_groups) if offered else None

    for name in wrong:
        grids[name] = nearest(name)
    after = dict(formats) | {name: "16 bits" if grid is None else str_of(grid) for name, grid in grids.items()}
    for names in groups_among(after, target):
        if len({after[name] for name in names}) == 1:
            continue
        encoded = [name for name in names if name in artifact.sites]
        kinds = {name: grids[name] if name in grids else nearest(name) for name in encoded}
        if len(encoded) < len(names) or any(grid is None for grid in kinds.values()):
            grids |= dict.fromkeys(encoded)  # one of them is at 16 bits, so all are
            continue
        widest = max((g for g in kinds.values() if g is not None), key=lambda g: (g.bits, -(g.group or 1 << 30)))
        grids |= dict.fromkeys(encoded, widest)
    return Fitting(artifact, sites, target, grids)


def str_of(grid: Grid) -> str:
    """A grid in words."""
    return described({"form": "integer", "float_zero": False, "scale_bits": 16, **grid.__dict__})
