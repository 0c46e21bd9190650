"""The acts as library functions, each taking what the one before returned.

    network     = layerwise.open("MODEL")
    calibration = layerwise.calibrate(network, "text.txt", work="WORK")
    seen        = layerwise.probe(network, "block_influence", calibration)
    candidates  = layerwise.candidates(calibration, techniques=("two_sided", "gptq"))
    chosen      = layerwise.plan(candidates, "4.5bpw")
    compressed  = layerwise.apply(candidates, chosen)
    layerwise.save(compressed, "OUT")
    quality     = layerwise.evaluate("OUT", dense="MODEL", text="held-out.txt")
    module      = layerwise.load("OUT")

``layerwise.compress("MODEL", "OUT", budget="4.5bpw")`` is all of it, with checks, baseline and report.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.apply import write_network
from layerwise.calibrate.passes import Calibration, forward
from layerwise.calibrate.splits import make_splits
from layerwise.calibrate.text import DEFAULT, read_text
from layerwise.candidates import find_candidates
from layerwise.compress import Result
from layerwise.compress import compress as run
from layerwise.engine.journal import Journal, identity_of
from layerwise.engine.machine import versions
from layerwise.engine.progress import Progress, Stopwatch
from layerwise.evaluate.artifact import ArtifactQuality, evaluate_artifact
from layerwise.kept import Candidates, overlay, rebuilt, with_removals
from layerwise.loss import loss_of
from layerwise.network.artifact import staged
from layerwise.network.network import Network, open_network
from layerwise.network.overlay import Overlay
from layerwise.plan.budget import parse_budget
from layerwise.plan.constraints import constrain
from layerwise.plan.menu import make_menu
from layerwise.plan.pareto import Pareto
from layerwise.plan.tree import Allocation
from layerwise.prepare import Options, check_device, check_tokens, longest, open_tokenizer, reachable
from layerwise.probe.measurement import Measurement
from layerwise.removal import find_removals
from layerwise.technique import BLOCK_INPUTS, Probe, parse_probe


@dataclass(frozen=True)
class Compressed:
    """A planned network: its encodings lie in the work folder, ``weights`` decodes them when they are read."""

    candidates: Candidates
    allocation: Allocation
    weights: Overlay


def calibrate(
    network: Network,
    text: str = DEFAULT,
    *,
    work: str | Path | None = None,
    sequences: int = 128,
    length: int = 256,
    text_column: str | None = None,
    pooling: str | None = None,
    seed: int = 0,
    threads: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Calibration:
    """Split the text and run the forward pass. ``work`` keeps everything for later; else a temporary folder does."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    check_device(device)
    loss = loss_of(network.architecture, network.checkpoint.directory, pooling)
    source = read_text(text, text_column)
    splits = make_splits(
        source, open_tokenizer(network), loss.causal, sequences, min(length, longest(network)), seed
    )  # fmt: skip
    check_tokens(splits.all, source, network)
    folder = Path(work) if work is not None else Path(tempfile.mkdtemp(prefix="layerwise-")) / "work"
    identity = {
        "weights": network.checkpoint.fingerprint(), "tokens": splits.fingerprint(), "loss": [loss.kind, loss.pooling],
        "seed": seed, "threads": torch.get_num_threads(), "device": device, "versions": versions(),
    }  # fmt: skip
    calibration = Calibration(network, loss, splits, Journal(folder, identity_of(identity)), seed, device)
    forward(calibration, Stopwatch(progress))
    return calibration


def probe(
    network: Network,
    probe: str | Probe,
    calibration: Calibration | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Measurement:
    """Look at a network and change nothing: ``layerwise.probe(network, "spectrum_alpha")``.

    A probe that reads hidden states takes them from ``calibration``, or from a forward pass of its own in a temporary
    folder; ``options`` are then those of ``calibrate`` (``text``, ``sequences``, ``length``, ``seed``, …). A probe that
    reads weights alone has no use for them.
    """
    found = parse_probe(probe) if isinstance(probe, str) else probe
    network.checkpoint.check_finite()
    if calibration is not None or BLOCK_INPUTS not in found.needs:
        return found.measure(network, calibration)
    with tempfile.TemporaryDirectory(prefix="layerwise-") as folder:
        calibration = calibrate(network, work=Path(folder) / "work", progress=progress, **options)
        try:
            return found.measure(network, calibration)
        finally:
            calibration.journal.close()


def candidates(
    calibration: Calibration, techniques: Sequence[str] = (), *, workers: int = 1, progress: Progress | None = None
) -> Candidates:
    """Encode every candidate of these techniques in one reverse pass."""
    menu = make_menu(tuple(techniques), str(calibration.network.plain_dtype).removeprefix("torch."))
    stage = f"candidates {identity_of({'menu': [menu.linear, menu.table]})[:12]}"
    watch = Stopwatch(progress)
    found = find_candidates(calibration, menu, workers, watch, stage)
    for surgeon in menu.surgeons:
        find_removals(calibration, found, stage, watch)
        found = with_removals(calibration, found, surgeon, stage)
    return found


def plan(found: Candidates, budget: str, *, keep: Sequence[str] = (), fix: Sequence[str] = ()) -> Allocation:
    """The best plan whose file fits the budget (``4.5bpw``, ``12MB``, ``25%``)."""
    network = found.network
    wanted = parse_budget(budget).bytes(network.tree.parameters, network.checkpoint.safetensors_bytes)
    fixed = reachable(network, make_menu((), "float16"), {}).fixed
    return Pareto().allocate(constrain(found.tree(), keep, fix), wanted - fixed)


def apply(found: Candidates, allocation: Allocation) -> Compressed:
    """The network that a plan describes; nothing is decoded before it is read."""
    recipes = {name: c.recipe for name, c in allocation.sites.items()}
    return Compressed(found, allocation, overlay(found, recipes))


def save(compressed: Compressed, out: str | Path, *, force: bool = False) -> int:
    """Write the artifact by one rename; returns the bytes of its weights file."""
    recipes = {name: c.recipe for name, c in compressed.allocation.sites.items()}
    with staged(Path(out), force) as folder:
        return write_network(rebuilt(compressed.candidates, recipes), folder)


def evaluate(
    artifact: str | Path, *, dense: str | Path, text: str, length: int = 256, **options: Any
) -> ArtifactQuality:
    """Measure a saved artifact against the dense network on held-out text.

    ``options`` are those of ``evaluate_artifact``: ``pooling``, ``sequences``, ``seed``.
    """
    network = open_network(dense)
    length = min(length, longest(network))
    return evaluate_artifact(
        str(artifact), str(dense), read_text(text), open_tokenizer(network), length=length, **options
    )


def compress(
    model: str | Path, out: str | Path, *, progress: Progress | None = None, command: str = "", **options: Any
) -> Result:
    """All acts in one: options are those of the command line, with underscores (``quality_loss="1%"``)."""
    return run(Options(model=str(model), out=str(out), **options), progress, command)
