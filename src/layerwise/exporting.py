"""The act *export*: an artifact in the form of another tool, and what that costs where the form cannot hold it exactly.

``FORMATS`` maps what ``--to`` names to a function that writes and returns the lines to print.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from layerwise.encoding.encoded import Encoded
from layerwise.errors import InputError, nearest


@dataclass(frozen=True)
class ExportOptions:
    """force: replace what is there.   reencode: round again what the format has no exact type for.
    text: what the loss of that is measured on."""

    force: bool = False
    reencode: bool = False
    text: str = "default"


def export(artifact: str, out: str, to: str, options: ExportOptions) -> list[str]:
    """Write ``out``; returns what to tell the user. Raises ``InputError`` for what the format cannot express."""
    if to not in FORMATS:
        raise InputError(f"there is no export to {to!r}{nearest(to, list(FORMATS))}")
    return FORMATS[to](artifact, out, options)


def _dense(artifact: str, out: str, options: ExportOptions) -> list[str]:
    from layerwise.export.dense import export_dense

    export_dense(artifact, out, force=options.force)
    return [f"wrote {out}"]


def _gguf(artifact: str, out: str, options: ExportOptions) -> list[str]:
    from layerwise.export.gguf import export_gguf

    done = export_gguf(artifact, out, reencode=options.reencode, force=options.force)
    types = ", ".join(f"{count} {name}" for name, count in sorted(Counter(done.types.values()).items()))
    said = [f"{_wrote(artifact, out, done.bytes)}, sites in {types}"]
    return said + _told(artifact, done.forms, {site: done.types[site] for site in done.forms}, options)


def _onnx(artifact: str, out: str, options: ExportOptions) -> list[str]:
    from layerwise.export.onnx import export_onnx

    done = export_onnx(artifact, out, reencode=options.reencode, force=options.force)
    said = [_wrote(artifact, out, done.bytes)]
    if done.widened:
        said.append(
            f"{len(done.widened)} sites are in fp16, for their form has no packed product: {done.widened[0]}, …"
        )
    types = {site: f"{form.spec().get('bits', 16)} bits" for site, form in done.forms.items()}
    return said + _told(artifact, done.forms, types, options)


def _wrote(artifact: str, out: str, size: int) -> str:
    from layerwise.network.artifact import open_artifact

    return f"wrote {out}: {size:,} bytes (the artifact: {open_artifact(artifact).size:,})"


FORMATS: dict[str, Callable[[str, str, ExportOptions], list[str]]] = {"dense": _dense, "gguf": _gguf, "onnx": _onnx}


def _told(artifact: str, forms: Mapping[str, Encoded], types: Mapping[str, str], options: ExportOptions) -> list[str]:
    """A warning with the measured loss where sites were rounded again."""
    if not forms:
        return []
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(Counter(types.values()).items()))
    before, after, name = measured_loss(artifact, forms, options.text)
    said = f"warning: {len(forms)} sites have no exact type and were rounded again ({kinds}); {name} to the artifact "
    said += f"{after[name]:.3g} (the same artifact in 16 bits: {before[name]:.1g})"
    if "perplexity" in after:
        said += f", perplexity {before['perplexity']:.4g} -> {after['perplexity']:.4g}"
    return [said + f" on {options.text} text; first: {', '.join(list(forms)[:3])}"]


def measured_loss(
    artifact_path: str, forms: Mapping[str, Encoded], text: str, sequences: int = 32, length: int = 256
) -> tuple[dict[str, float], dict[str, float], str]:
    """Metrics of an artifact as it is and with some sites in other forms, against its weights in 16 bits.

    Returns (metrics before, metrics after, name of the loss: ``kl`` or ``distance``).
    """
    from layerwise.calibrate.splits import batches_of
    from layerwise.calibrate.text import read_text
    from layerwise.evaluate.compare import compare
    from layerwise.export.dense import export_dense
    from layerwise.loss import loss_of
    from layerwise.network.artifact import open_artifact
    from layerwise.network.network import open_network
    from layerwise.network.overlay import Fetch, Overlay
    from layerwise.prepare import longest, open_tokenizer

    artifact = open_artifact(artifact_path)

    def stored(site: str) -> Fetch:
        return lambda: artifact.encoded(site)

    def changed(site: str) -> Fetch:
        return lambda: forms[site]

    with tempfile.TemporaryDirectory(prefix="layerwise-") as scratch:
        export_dense(artifact_path, Path(scratch) / "dense")
        network = open_network(Path(scratch) / "dense")
        loss = loss_of(network.architecture, network.checkpoint.directory, None)
        tokenizer = open_tokenizer(network)
        length = min(length, longest(network))
        batches = batches_of(read_text(text).documents, tokenizer, loss.causal, sequences, length)
        before = {site: stored(site) for site in artifact.sites}
        after = before | {site: changed(site) for site in forms}
        variants = {"before": Overlay(network, before), "after": Overlay(network, after)}
        found = compare(network, variants, loss, batches, Path(scratch))
    return dict(found["before"].metrics), dict(found["after"].metrics), loss.name
