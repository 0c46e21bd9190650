"""What ``layerwise bench`` measures of a probe: whether its number for each place says what changing the place costs.

linears  each rounded to nearest alone, 3 bits in groups of 64, all else dense; the loss's rise on steer tokens
blocks   each taken out alone; the loss's rise on judge tokens

A probe that runs the network in ways of its own brings its evidence along: its loss beside the loss with its idea taken
out (``Measurement.compared``). Of every other the evidence is Spearman's rank correlation between the probe's first
figure and the rise, over the places where the probe has a figure; written as ``1 - |correlation|``, so that smaller is
better. The sign is dropped, as a probe does not say which way its figure counts; so it is for what it is held against:
the number of weights of each place, and how far down the network it lies. Over few places large correlations come by
chance: the spread over seeds is beside them, and a probe that reads weights alone has one number for all seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from layerwise.acts.removal import measure_on_steer, measure_removals
from layerwise.calibrate.statistics import SiteStatistics
from layerwise.errors import InputError
from layerwise.network.network import Network
from layerwise.plan.menu import fitted
from layerwise.probe.measurement import Compared, Measurement
from layerwise.recipe import parse_probe, parse_recipe
from layerwise.trials.by_loss import FLOOR, GROUP, Figures, Ground, Side, Trial

BITS = 3
METRIC = "1 - rank correlation, unsigned"
FEWEST = 3  # places: two are in order by chance


def probe_trials(ground: Ground, technique: str) -> list[Trial]:
    """The probe's figure, against the number of weights and the place in the network."""
    network, seed = ground.network, ground.prepared.options.seed
    probe = parse_probe(technique, seed)
    measurement = probe.measure(network, ground.calibration)
    if measurement.compared:
        return [compared_trial(str(parse_probe(technique)), found, network) for found in measurement.compared]
    name, figures = first_figures(measurement)
    damages, change = damages_of(ground, figures)
    places = [place for place in damages if figures[place] is not None]
    if len(places) < FEWEST:
        raise InputError(f"{probe} has figures for {len(places)} places of {network.name}; {FEWEST} are needed")
    rises = [damages[place] for place in places]
    mine = disorder([float(figures[place] or 0.0) for place in places], rises)
    held = {
        "number of weights": [float(weights_below(network, place)) for place in places],
        "place in the network": [float(i) for i in range(len(places))],
    }
    size = network.checkpoint.safetensors_bytes
    return [
        Trial(
            Side(f"{parse_probe(technique)}: {name} of {len(places)} places, {change}", size, None),
            Side(other, size, None),
            Figures(METRIC, mine, disorder(numbers, rises)),
        )
        for other, numbers in held.items()
    ]


def compared_trial(probe: str, found: Compared, network: Network) -> Trial:
    """What a probe that runs the network in other ways has measured with its idea and without."""
    size = network.checkpoint.safetensors_bytes
    return Trial(
        Side(f"{probe}: {found.setting}", size, None),
        Side(found.baseline, size, None),
        Figures(found.metric, found.value, found.other),
    )


def first_figures(measurement: Measurement) -> tuple[str, dict[str, float | None]]:
    """(name, place -> value) of the first column; its texts are no figures."""
    name = measurement.columns[0].name
    return name, {
        place: float(value) if isinstance(value, int | float) else None
        for place, value in measurement.column(name).items()
    }


def damages_of(ground: Ground, figures: Mapping[str, float | None]) -> tuple[dict[str, float], str]:
    """(place -> measured rise of the loss, what was changed there) for the blocks or the linears that were probed."""
    network = ground.network
    blocks = network.tree.blocks
    if set(figures) <= set(blocks):
        with ground.watch.stage("take blocks out", len(blocks)) as advance:
            measures = measure_removals(ground.calibration, advance)
        return {b: m.damage for b, m in zip(blocks, measures, strict=True) if b in figures}, "each taken out"
    sites = [s for s in network.tree.sites if s.kind == "linear" and s.name in figures]
    if not sites:
        raise InputError("the probe has figures for neither blocks nor linears, so nothing can be changed there")
    recipe = f"{FLOOR}:bits={BITS},group={GROUP}"
    changes = []
    for site in sites:
        encoder = parse_recipe(fitted(recipe, site.columns)).encoder
        statistics = SiteStatistics.uninformed(site.rows, site.columns)
        changes.append((site.name, encoder.encode(network.read_site(site).contiguous(), statistics)))
    with ground.watch.stage(f"round {len(sites)} linears one by one", 1) as advance:
        rises = measure_on_steer(ground.calibration, changes)
        advance()
    return {site.name: rise for site, rise in zip(sites, rises, strict=True)}, f"each stored as {recipe}"


def weights_below(network: Network, place: str) -> int:
    sites: Callable[[str], bool] = lambda name: name == place or name.startswith(f"{place}.")  # noqa: E731
    return sum(s.parameters for s in network.tree.sites if sites(s.name))


def disorder(figures: Sequence[float], rises: Sequence[float]) -> float:
    """``1 - |Spearman|``, ties sharing their rank; 1 where one of the two has a single value."""
    import numpy as np
    from scipy.stats import rankdata

    one, other = rankdata(figures), rankdata(rises)
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 1.0
    return max(0.0, 1.0 - abs(float(np.corrcoef(one, other)[0, 1])))
