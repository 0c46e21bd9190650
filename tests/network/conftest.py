"""An artifact of a network in which every searched site is rounded to nearest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Pack = Callable[..., Path]


def pack_network(source: Path, out: Path, recipe: str = "rtn:bits=4,group=16") -> Path:
    """Encode every searched site of ``source`` by ``recipe`` and write the artifact ``out``."""
    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.network.artifact import artifact_layout, predicted_size, staged, write_artifact
    from layerwise.network.network import open_network
    from layerwise.recipe import parse_recipe

    network, encoder = open_network(source), parse_recipe(recipe).encoder
    sites = [site for site in network.tree.sites if site.searched]
    turned = {site.parameter for site in sites if site.transposed}
    names = network.plain_parameters([site.name for site in sites])
    parameters = dict(network.module.named_parameters())
    plain = {name: (network.plain_dtype, tuple(parameters[name].shape)) for name in names}
    forms = {site.parameter: encoder.layout(site.rows, site.columns) for site in sites}

    def encoded():
        for site in sites:
            yield (
                site.parameter,
                encoder.encode(network.read_site(site), SiteStatistics.uninformed(site.rows, site.columns)),
            )

    def stored():
        for name in names:
            yield name, network.checkpoint.read_plain(network.stored.of[name])

    layout = artifact_layout(forms, plain, turned)
    with staged(out) as folder:
        size = write_artifact(folder, network.checkpoint, layout, encoded(), stored(), turned)
    assert size == predicted_size(forms, plain, network.checkpoint)
    return out


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    """``pack(source, recipe=…, name="out")`` -> artifact directory."""

    def make(source: Path, recipe: str = "rtn:bits=4,group=16", name: str = "out") -> Path:
        return pack_network(source, tmp_path / name, recipe)

    return make
