"""The act *export*: an artifact in the form of another tool, and what that costs where the form cannot hold it exactly.

``FORMATS`` maps what ``--to`` names to a function that writes and returns the lines to print.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from layerwise.encoding.encoded import Encoded
from layerwise.errors import InputError, nearest


@dataclass(frozen=True)
class ExportOptions:
    """force: replace what is there.   reencode: round again what the format has no exact type for.
    text: what the loss of that is measured on.   target: the engine, where a format is read by several."""

    force: bool = False
    reencode: bool = False
    text: str = "default"
    target: str | None = None


def export(artifact: str, out: str, to: str, options: ExportOptions) -> list[str]:
    """Write ``out``; returns what to tell the user. Raises ``InputError`` for what the format cannot express."""
    if to not in FORMATS:
        raise InputError(f"there is no export to {to!r}{nearest(to, list(FORMATS))}")
    check_in_order(artifact)
    return FORMATS[to](artifact, out, options)


def check_in_order(path: str) -> None:
    """``InputError`` for a network whose blocks do not run once each, one after the other, for every input."""
    from layerwise.network.artifact import open_artifact

    artifact = open_artifact(path)
    if artifact.arrangement is not None:
        raise InputError(f"{path} is an arrangement of shared or parallel blocks, which no other format can say")
    if artifact.depths is not None:
        raise InputError(f"{path} runs its blocks for some inputs only, which no other format can say")


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


def _told(artifact: str, forms: Mapping[str, Encoded], types: Mapping[str, str], options: ExportOptions) -> list[str]:
    """A warning with the measured loss where sites were rounded again."""
    if not forms:
        return []
    from layerwise.jobs.rounding_loss import loss_of_rounding
    from layerwise.network.network import open_network

    kinds = ", ".join(f"{count} {name}" for name, count in sorted(Counter(types.values()).items()))
    before, after = loss_of_rounding(
        open_network(artifact), {s: partial(forms.__getitem__, s) for s in forms}, options.text
    )
    name = next(loss for loss in ("kl", "distance") if loss in after)
    said = f"warning: {len(forms)} sites have no exact type and were rounded again ({kinds}); {name} to the artifact "
    said += f"{after[name]:.3g}"
    if "perplexity" in after:
        said += f", perplexity {before['perplexity']:.4g} -> {after['perplexity']:.4g}"
    return [said + f" on {options.text} text; first: {', '.join(list(forms)[:3])}"]


def _compressed_tensors(artifact: str, out: str, options: ExportOptions) -> list[str]:
    from layerwise.export.compressed_tensors import fitting_of, write_compressed_tensors
    from layerwise.jobs.rounding_loss import loss_of_rounding
    from layerwise.network.artifact import open_artifact
    from layerwise.network.network import open_network

    opened = open_artifact(artifact)
    fitting = fitting_of(opened, options.target, options.reencode)
    said = []
    if changes := fitting.changed():
        forms = {name: partial(fitting.encoded, name) for name in changes if not fitting.dense(name)}
        before, after = loss_of_rounding(open_network(artifact), forms, options.text)
        kinds = Counter(f"{change.before} -> {change.after}" for change in changes.values())
        said.append(f"warning: {len(changes)} sites were rounded for {fitting.target.name}: {next(iter(changes))}, …")
        said += [f"  {count} × {kind}" for kind, count in kinds.items()]
        figures = [
            f"{name} {value:.4g}" + ("" if value == before.get(name) else f" (was {before[name]:.4g})")
            for name, value in after.items()
        ]
        said.append(f"  measured against the artifact on {options.text} text: {', '.join(figures)}")
    made = write_compressed_tensors(fitting, out, options.force)
    return [*said, f"wrote {out} for {made.target}: {made.bytes:,} bytes (the artifact: {opened.size:,})"]


FORMATS: dict[str, Callable[[str, str, ExportOptions], list[str]]] = {
    "dense": _dense,
    "compressed-tensors": _compressed_tensors,
    "gguf": _gguf,
    "onnx": _onnx,
}
