"""The act *export*: an artifact in the format of another engine, and what rounding it for that engine loses.

What an engine takes as it is is copied code by code. With ``reencode`` the rest is rounded to the nearest grid, and
the artifact is then compared with what was written, on text.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from layerwise.calibrate.splits import batches_of
from layerwise.calibrate.text import DEFAULT, read_text
from layerwise.encoding.encoded import Encoded
from layerwise.errors import InputError, nearest
from layerwise.evaluate.compare import compare
from layerwise.export.compressed_tensors import EXPORT, fitting_of, write_compressed_tensors
from layerwise.export.dense import export_dense
from layerwise.export.fitting import Rounded
from layerwise.loss import loss_of_network
from layerwise.network.artifact import open_artifact
from layerwise.network.network import Network, open_network, reads_images
from layerwise.network.overlay import Overlay
from layerwise.prepare import check_tokens, longest, open_tokenizer

SEQUENCES = 32  # of the text that a loss is measured on
LENGTH = 256


@dataclass(frozen=True)
class Written:
    """What an export made.

    target:  the engine that it is for.
    rounded: site -> what it was and what it became.
    before, after: metrics of the artifact and of what was written, against the artifact; None if nothing was rounded.
    """

    bytes: int
    target: str | None = None
    rounded: Mapping[str, Rounded] = field(default_factory=dict)
    before: Mapping[str, float] | None = None
    after: Mapping[str, float] | None = None


def export(
    artifact: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str = "dense",
    *,
    target: str | None = None,
    reencode: bool = False,
    text: str = DEFAULT,
    force: bool = False,
) -> Written:
    """Write ``artifact`` into ``out`` in the format ``to``; ``text`` is what a loss by ``reencode`` is measured on.

    Raises ``InputError`` before anything is written for a site that the format or the engine cannot express.
    """
    if to not in FORMATS:
        raise InputError(f"there is no export to {to!r}{nearest(to, list(FORMATS))}")
    return FORMATS[to](artifact, out, target, reencode, text, force)


def _dense(
    artifact: str | os.PathLike[str], out: str | os.PathLike[str], target: str | None, reencode: bool, text: str,
    force: bool,
) -> Written:  # fmt: skip
    if target is not None or reencode:
        raise InputError("--target and --reencode are for packed formats; a dense export holds every network")
    return Written(export_dense(artifact, out, force=force))


def _compressed_tensors(
    artifact: str | os.PathLike[str], out: str | os.PathLike[str], target: str | None, reencode: bool, text: str,
    force: bool,
) -> Written:  # fmt: skip
    fitting = fitting_of(open_artifact(artifact), target, reencode)
    before = after = None
    if fitting.grids:
        changed = {name: partial(fitting.encoded, name) for name in fitting.grids if not fitting.dense(name)}
        before, after = measured(open_network(os.fspath(artifact)), changed, text)
    made = write_compressed_tensors(fitting, out, force)
    return Written(made.bytes, made.target, made.rounded, before, after)


def measured(
    network: Network, changed: Mapping[str, Callable[[], Encoded]], text: str = DEFAULT
) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of a network, and of the same with some sites in other forms, against it, on the first part of a text."""
    if reads_images(network):
        raise InputError("what rounding loses is measured on text only; make the artifact with --target instead")
    loss = loss_of_network(network, None)
    tokenizer, source = open_tokenizer(network), read_text(text)
    batches = batches_of(source.documents, tokenizer, loss.causal, SEQUENCES, min(LENGTH, longest(network)))
    check_tokens(batches, source, network)
    with tempfile.TemporaryDirectory(prefix="layerwise-") as scratch:
        found = compare(network, {"changed": Overlay(network, changed)}, loss, batches, Path(scratch))
    return dict(found["dense"].metrics), dict(found["changed"].metrics)


FORMATS = {"dense": _dense, EXPORT: _compressed_tensors}
