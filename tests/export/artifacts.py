"""Artifacts made on the spot: recipes on linears and tables, with statistics of nothing."""

from __future__ import annotations

from pathlib import Path

import torch

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.encoding.encoded import Encoded
from layerwise.network.artifact import artifact_layout, staged, write_artifact
from layerwise.network.network import open_network
from layerwise.recipe import parse_recipe

TABLES = ("embed_tokens", "wte", "word_embeddings")


def artifact(source: Path, out: Path, recipe: str, tables: str | None = None) -> Path:
    """``recipe`` on every linear and head, ``tables`` (or the same) on word tables; the rest in 16 bits."""
    network, forms, turned = open_network(source), {}, set()
    for site in network.tree.sites:
        text = recipe if site.kind in ("linear", "head") else tables or recipe
        if site.kind not in ("linear", "head") and not site.name.endswith(TABLES):
            continue
        weight = network.read_site(site)
        form: Encoded = parse_recipe(text).encoder.encode(weight, SiteStatistics.uninformed(site.rows, site.columns))
        forms[site.parameter] = form
        if site.transposed:
            turned.add(site.parameter)
    plain = network.plain_parameters([name.removesuffix(".weight") for name in forms])
    values = {name: network.read(name).to(torch.float16) for name in plain}
    layout = artifact_layout(
        {name: {k: (t.dtype, tuple(t.shape)) for k, t in form.tensors().items()} for name, form in forms.items()},
        {name: (t.dtype, tuple(t.shape)) for name, t in values.items()},
        turned,
    )
    with staged(out, True) as folder:
        write_artifact(folder, network.checkpoint, layout, forms.items(), values.items(), turned)
    return out
