"""The composition *reshape*: a network of another shape, as a plain checkpoint that every tool loads.

    open → forward pass → surgeon → write → evaluate against the network it came from

A surgeon of blocks (``drop_block:count=2``) decides by measured removals which blocks remain; a surgeon of the whole
network (fewer heads and channels, more blocks) takes what it needs from the calibration. The result is dense: it can be
trained on with ``layerwise tune``, and compressed.
"""

from __future__ import annotations

import datetime
import json
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from layerwise.acts.apply import write_network
from layerwise.acts.kept import Rebuilt
from layerwise.acts.prepare import Options
from layerwise.acts.record import row
from layerwise.acts.removal import measure_removals
from layerwise.calibrate.passes import Calibration, forward
from layerwise.compress import start
from layerwise.engine.progress import Progress, Stopwatch
from layerwise.errors import InputError
from layerwise.evaluate.compare import compare
from layerwise.evaluate.latency import forward_seconds
from layerwise.network.artifact import staged
from layerwise.network.load import load
from layerwise.network.network import Network
from layerwise.network.overlay import Overlay
from layerwise.network.reblocked import reblocked
from layerwise.recipe import parse_surgeon
from layerwise.roles import BlockMeasure, NetworkSurgeon, Surgeon

RESHAPED = "reshaped.json"  # what was done and measured, beside the weights
ROUNDS = 3  # in which both networks are timed in turn


@dataclass(frozen=True)
class Reshaped:
    """A finished operation: ``rows`` are the evidence rows of the network as it came and as it is written."""

    out: Path
    surgeon: str
    network: str
    blocks: tuple[int, int]  # before, after
    parameters: tuple[int, int]
    rows: tuple[dict[str, Any], ...]
    latency_ms: tuple[float, ...]  # of one sequence
    data: str


def reshape(options: Options, surgeon: str, progress: Progress | None = None, command: str = "") -> Reshaped:
    """Operate on ``options.model`` and write a checkpoint to ``options.out``.

    Raises ``InputError`` before any long work for an unknown surgeon or option, and for a network it cannot act on.
    """
    found, out = parse_surgeon(surgeon), Path(options.out)
    watch = Stopwatch(progress)
    prepared, calibration, _ = start(replace(options, techniques=("dense",), baseline=False), watch)
    network = prepared.network
    if network.whole:
        raise InputError("a network that was opened as a module cannot be reshaped; save it as a checkpoint first")
    try:
        check_changes(found, network)
        forward(calibration, watch)
        made = operated(found, network, calibration, watch)
        batches, folder = prepared.evaluation.batches, calibration.folder
        stored = Rebuilt(made, {}, {}, {})
        with staged(out, options.force) as part:
            with watch.stage("write", 1) as advance:
                size = write_network(stored, part)
                advance()
            total = len(network.tree.blocks) + len(made.tree.blocks)
            with watch.stage("evaluate", total) as advance:
                variants = {"reshaped": Overlay(made, {}, {})}
                measured = compare(network, variants, prepared.loss, batches, folder, options.device, advance)
            first, modules = batches[0].rows(0, 1), [load(str(p)) for p in (network.checkpoint.directory, part)]
            rounds = [[1e3 * forward_seconds(module, first) for module in modules] for _ in range(ROUNDS)]
            latency = tuple(statistics.median(times) for times in zip(*rounds, strict=True))
            parameters, came = (network.tree.parameters, made.tree.parameters), network.checkpoint.safetensors_bytes
            rows = (
                row("dense", None, came, None, parameters[0], measured["dense"], prepared),
                row("reshaped", str(found), size, None, parameters[1], measured["reshaped"], prepared),
            )  # fmt: skip
            result = Reshaped(
                out, str(found), network.name, (len(network.tree.blocks), len(made.tree.blocks)),
                parameters, rows, latency, prepared.evaluation.text.source,
            )  # fmt: skip
            (part / RESHAPED).write_text(written(result, command), encoding="utf-8")
    except BaseException as reason:
        calibration.journal.close(remove=isinstance(reason, InputError) and options.work is None)
        raise
    calibration.journal.close(remove=options.work is None)
    return result


def operated(
    surgeon: Surgeon | NetworkSurgeon, network: Network, calibration: Calibration, progress: Progress
) -> Network:
    """The network that a surgeon makes; one that changes nothing is refused, since nothing would be written."""
    if isinstance(surgeon, Surgeon):
        with progress.stage("measure removals", len(network.tree.blocks)) as advance:
            made = reblocked(network, surgeon.order(measure_removals(calibration, advance)))
    else:
        made = surgeon.operate(network, calibration, progress)
    if made is network:
        raise InputError(f"{surgeon} leaves {network.name} as it is; give an option that changes something")
    return made


def check_changes(surgeon: Surgeon | NetworkSurgeon, network: Network) -> None:
    """Refuse a surgeon of blocks that would keep every block, before anything is measured."""
    alike = [BlockMeasure(0.0, 0.0)] * len(network.tree.blocks)
    if isinstance(surgeon, Surgeon) and surgeon.order(alike) == tuple(range(len(alike))):
        raise InputError(f"{surgeon} leaves {network.name} as it is; say how many blocks, as in {surgeon.name}:count=1")


def written(result: Reshaped, command: str) -> str:
    """``reshaped.json``."""
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    described = {**asdict(result), "out": result.out.name, "command": command, "created": created}
    return json.dumps(described, indent=2) + "\n"
