"""An artifact as ``model.onnx`` and ``model.onnx.data`` for ONNX Runtime, packed as it is.

Sites keep their codes and steps (see ``onnx_weights``); everything else keeps its 16 bits, so that the two files are
about as large as the artifact. A site whose form has no equal is refused by name, or with ``reencode`` rounded again
to a symmetric grid of 4 or 8 bits in groups of 32, the first that is as wide as the site was stored, or to fp16
beyond. What that costs is for the caller to measure: ``OnnxExport.forms`` has the new weights.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from layerwise.encoding.dense import Dense
from layerwise.encoding.encoded import Encoded
from layerwise.encoding.grid import Grid, fit_grid, round_to_grid
from layerwise.encoding.integer import GroupedInteger
from layerwise.encoding.levels import half_holds
from layerwise.errors import InputError
from layerwise.export.onnx_graph import Graph, need_onnx
from layerwise.export.onnx_networks import Source, network_of
from layerwise.export.onnx_weights import supported
from layerwise.network.artifact import Artifact, open_artifact, staged, write_config
from layerwise.network.companions import copy_companions

MODEL = "model.onnx"
DATA = "model.onnx.data"  # beside it


@dataclass
class OnnxExport:
    """bytes: of the graph and its data.   widened: sites that are in fp16, which holds their values, but not so short.
    forms: site -> its new weight, where it was rounded again."""

    bytes: int = 0
    widened: tuple[str, ...] = ()
    forms: dict[str, Encoded] = field(default_factory=dict)


def export_onnx(
    artifact_path: str | os.PathLike[str], folder: str | os.PathLike[str], reencode: bool = False, force: bool = False
) -> OnnxExport:
    """Write ``folder``: the graph, its data, config and tokenizer. What ONNX cannot express is an ``InputError``."""
    need_onnx()
    artifact = open_artifact(artifact_path)
    write = network_of(artifact.checkpoint.architecture)
    if artifact.inputs:
        raise InputError(
            f"{artifact.directory} multiplies quantized inputs at {next(iter(artifact.inputs))}; the onnx export "
            f"computes in float32, so export an artifact without them"
        )
    inexact, widened = _inexact(artifact, reencode)
    done = OnnxExport(widened=tuple(sorted(widened)))

    def fetch(site: str) -> Encoded:
        form = artifact.encoded(site)
        if site in inexact and site not in done.forms:
            done.forms[site] = rounded(form)
        if site in widened:
            return Dense.of(form.decode(), torch.float16)
        return done.forms.get(site, form)

    with staged(Path(folder), force) as out:
        with open(out / DATA, "wb") as data:
            graph = Graph(data, DATA)
            write(Source(artifact, graph, fetch))
        graph.save(out / MODEL)
        copy_companions(artifact.checkpoint.companions, out)
        write_config(out, {k: v for k, v in artifact.config.items() if k != "quantization_config"})
        done.bytes = sum((out / name).stat().st_size for name in (MODEL, DATA))
    return done


def _inexact(artifact: Artifact, reencode: bool) -> tuple[set[str], set[str]]:
    """Sites that are rounded again (refused unless ``reencode``), and those that fp16 holds."""
    reasons: dict[str, str] = {}
    widened: set[str] = set()
    for site, stored in artifact.sites.items():
        if stored.kernel is not None:
            raise InputError(f"site {site} is a convolution; the onnx export knows linears and tables")
        form = artifact.encoded(site)
        reason = supported(form)
        if reason is not None and half_holds(form):
            widened.add(site)
        elif reason is not None:
            reasons[site] = reason
    if reasons and not reencode:
        site, reason = next(iter(reasons.items()))
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        raise InputError(
            f"the onnx export has no exact equal for site {site}{more}: it {reason}; give --reencode to round such "
            f"sites again"
        )
    return set(reasons), widened


def rounded(form: Encoded) -> Encoded:
    """A form rounded to what ``MatMulNBits`` multiplies, or to fp16 where that would be narrower than it is."""
    weight = form.decode()
    bits = 8 * form.nbytes / weight.numel()
    if bits > 9:
        return Dense.of(weight, torch.float16)
    fitted = fit_grid(weight, Grid(bits=4 if bits <= 4.5 else 8, group=32, symmetric=True), clip=True)
    return GroupedInteger.from_codes(round_to_grid(weight, fitted), fitted)
