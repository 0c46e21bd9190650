"""What a run puts on the disk, and whether it will fit: checked before long work."""

from __future__ import annotations

import shutil
from pathlib import Path

from layerwise.acts.prepare import Options, Prepared, recipes_for, site_bytes
from layerwise.acts.wanted import wanted_by
from layerwise.calibrate.reverse import DRAWS
from layerwise.calibrate.statistics import LARGEST_FULL_SIDE, Wanted
from layerwise.errors import InputError
from layerwise.network.network import Network, hidden_width
from layerwise.recipe import parse_recipe

LARGEST_KEPT = 4_000_000_000  # bytes; larger statistics are gathered again by a second reverse pass


def check_disk(prepared: Prepared, folder: Path) -> None:
    """Refuse to begin when the work folder and the result will not fit on the disk."""
    needed = disk_needed(prepared)
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"the run needs about {needed / 1e6:.0f} MB of disk in {folder} and {free / 1e6:.0f} MB are free; "
            f"free some or give --work on another disk"
        )


def disk_needed(prepared: Prepared) -> int:
    """Bytes: block inputs, two boundaries of gradients, statistics, candidates, the artifact and its baseline."""
    network = prepared.network
    blocks = len(network.parts)
    padded = sum(b.tokens.numel() for b in prepared.splits.all)
    arriving = 2 if prepared.options.sequential or prepared.options.tune else 0
    states = 0 if network.whole else padded * hidden_width(network) * 4 * (blocks + 1 + 2 * DRAWS + arriving)
    recipes = (*prepared.menu.linear, *prepared.menu.table, *prepared.only.values())
    kept = statistics_bytes(network, wanted_by(recipes)) if keeps_statistics(prepared.options, network) else 0
    return states + kept + candidate_bytes(prepared) + 2 * prepared.range.largest


def keeps_statistics(options: Options, network: Network) -> bool:
    """Whether statistics stay on disk so that the chosen recipes can be encoded again without another pass."""
    if options.tune and options.uniform and parse_recipe(options.uniform).rewrites:
        return True  # rewritten matrices are kept beside them, and a tuner starts from those
    return options.sequential or (not options.uniform and statistics_bytes(network) <= LARGEST_KEPT)


def statistics_bytes(network: Network, wanted: Wanted = Wanted()) -> int:
    """Bytes of all sites' statistics on disk."""
    sites = [s for s in network.tree.sites if s.searched]
    more = sum(4 * s.parameters for s in sites) if wanted.gradient else 0
    return more + sum(4 * (side(s.rows) + (2 + wanted.sides) * side(s.columns)) for s in sites)


def side(width: int) -> int:
    """Values of one side of a site's statistics."""
    return width**2 if width <= LARGEST_FULL_SIDE else width


def candidate_bytes(prepared: Prepared) -> int:
    total = 0
    for site in prepared.network.tree.sites:
        for recipe in recipes_for(site, prepared.menu, prepared.only, prepared.network):
            total += site_bytes(site, recipe, prepared.network)
    return total
