"""The act *open*, with a rewrite of the whole network on top where one is asked for (``--rewrite``)."""

from __future__ import annotations

from pathlib import Path

from layerwise.errors import InputError
from layerwise.network.network import Network, open_network
from layerwise.recipe import parse_technique
from layerwise.roles import NetworkRewrite
from layerwise.technique import names


def open_rewritten(source: str | Path, dtype: str = "auto", rewrite: str | None = None) -> Network:
    """``open_network``, then the rewrite: headers only, its weights change as they are read."""
    asked = network_rewrite(rewrite) if rewrite else None
    network = open_network(source, dtype)
    return network if asked is None else asked.rewrite(network)


def network_rewrite(text: str) -> NetworkRewrite:
    """``pre_rmsnorm:tied=lookup`` -> the rewrite of the whole network that comes before everything else."""
    found = parse_technique(text)
    if not isinstance(found, NetworkRewrite):
        listed = ", ".join(names(NetworkRewrite))
        raise InputError(f"--rewrite names {found.name}, which is no rewrite of a whole network; there are {listed}")
    return found
