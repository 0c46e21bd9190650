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

A network that is no checkpoint is opened with its inputs, and loaded into a module of its own class:

    network = layerwise.open(module, images)
    layerwise.compress(network, "OUT", budget="4bpw", evaluate=(held_out, labels))
    layerwise.load("OUT", into=Module())
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.acts.activations import grids_of_artifact
from layerwise.acts.apply import write_network
from layerwise.acts.candidates import find_candidates
from layerwise.acts.images import Given, images_at_once, positions_of
from layerwise.acts.kept import Candidates, overlay, rebuilt, with_removals
from layerwise.acts.prepare import Options, check_device, check_tokens, longest, open_tokenizer, reachable
from layerwise.acts.removal import find_removals
from layerwise.acts.wanted import wanted_by
from layerwise.calibrate.images import Images, image_splits, read_images
from layerwise.calibrate.passes import Calibration, forward
from layerwise.calibrate.splits import make_splits
from layerwise.calibrate.text import DEFAULT, read_text
from layerwise.compress import Result
from layerwise.compress import compress as run
from layerwise.engine.journal import Journal, identity_of
from layerwise.engine.machine import versions
from layerwise.engine.progress import Progress, Stopwatch
from layerwise.errors import InputError
from layerwise.evaluate.artifact import ArtifactQuality, evaluate_artifact, evaluate_on_images
from layerwise.jobs.blocks import TOKENS, measure_blocks
from layerwise.loss import loss_of_network
from layerwise.nas.network import is_searched, load_searched
from layerwise.network.artifact import open_artifact, staged
from layerwise.network.module import ModuleNetwork, batches_of_inputs, inputs_of, open_module
from layerwise.network.network import Network, open_network, reads_images
from layerwise.network.overlay import Overlay
from layerwise.plan.budget import parse_budget
from layerwise.plan.constraints import constrain
from layerwise.plan.menu import make_menu
from layerwise.plan.pareto import Pareto
from layerwise.plan.tree import Allocation
from layerwise.probe.measurement import Measurement
from layerwise.recipe import parse_probe
from layerwise.roles import Probe
from layerwise.technique import BLOCK_INPUTS

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Compressed:
    """A planned network: its encodings lie in the work folder, ``weights`` decodes them when they are read."""

    candidates: Candidates
    allocation: Allocation
    weights: Overlay


def open_any(source: str | Path | nn.Module, batches: Any = None, dtype: str = "auto") -> Network:
    """Open a checkpoint directory or hub id, or any module that maps ``[n, ...]`` floats to scores ``[n, classes]``.

    A folder that ``layerwise search`` wrote is opened with images, as the module that it holds.

    batches: inputs of a module: a tensor ``[n, ...]``, a pair with labels ``[n]``, or an iterable of either.
    dtype:   of what is not encoded: auto, float16 or bfloat16.
    """
    from torch import nn

    if not isinstance(source, nn.Module):
        if not is_searched(source):
            return open_network(source, dtype)
        source = load_searched(source)
    if batches is None:
        raise InputError("a module is opened with its inputs: layerwise.open(module, batches)")
    return open_module(source, batches, dtype)


def calibrate(
    network: Network,
    text: Any = DEFAULT,
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
    """Split the data and run the forward pass. ``work`` keeps everything for later; else a temporary folder does.

    text: a text source; for a network that reads images a file or tensor of them, by default those it was opened with.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    check_device(device)
    loss = loss_of_network(network, pooling)
    if reads_images(network):
        images = images_for(network, None if isinstance(text, str) and text == DEFAULT else text)
        positions = positions_of(network, images)
        splits = image_splits(images, positions, sequences * length, images_at_once(network), seed)
    else:
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


def measure_depth(
    network: Network, *, tokens: int = TOKENS, progress: Progress | None = None, **options: Any
) -> Measurement:
    """What each block is worth: ``layerwise.library.measure_depth(network)``; see ``blocks.py``.

    ``options`` are those of ``calibrate``. The network is in memory whole, as float32.
    """
    network.checkpoint.check_finite()
    with tempfile.TemporaryDirectory(prefix="layerwise-") as folder:
        calibration = calibrate(network, work=Path(folder) / "work", progress=progress, **options)
        try:
            with Stopwatch(progress).stage("measure blocks", 1) as advance:
                found = measure_blocks(calibration, tokens)
                advance()
            return found
        finally:
            calibration.journal.close()


def candidates(
    calibration: Calibration, techniques: Sequence[str] = (), *, workers: int = 1, progress: Progress | None = None
) -> Candidates:
    """Encode every candidate of these techniques in one reverse pass."""
    menu = make_menu(tuple(techniques), str(calibration.network.plain_dtype).removeprefix("torch."))
    stage = f"candidates {identity_of({'menu': [menu.linear, menu.table]})[:12]}"
    watch = Stopwatch(progress)
    calibration = replace(calibration, wanted=wanted_by([*menu.linear, *menu.table]))
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


def images_for(network: Network, given: Any) -> Images:
    """Images from a file, or from what ``layerwise.open`` takes as batches; None: those the network came with."""
    if isinstance(given, (str, Path)):
        return read_images(str(given))
    if given is not None:
        return Images("images in memory", *inputs_of(given))
    if not isinstance(network, ModuleNetwork):
        raise InputError(f"{network.architecture} reads images; give a file of them, or a tensor [n, c, h, w]")
    return Images("images in memory", network.pixels, network.labels)


def evaluate(
    artifact: str | Path,
    *,
    dense: str | Path | Network,
    text: Any,
    length: int = 256,
    activations: str | None = None,
    **options: Any,
) -> ArtifactQuality:
    """Measure a saved artifact against the dense network on held-out text or images.

    text: a text source; for a network that reads images a file of them, or a pair (images, labels).

    activations: measure it once more with the inputs of its linears quantized: ``token_int:bits=8``.

    ``options`` are those of ``evaluate_artifact``: ``pooling``, ``sequences``, ``seed``.
    """
    network = dense if isinstance(dense, Network) else open_network(dense)
    inputs = grids_of_artifact(open_artifact(artifact), network, activations)
    if reads_images(network):
        images = images_for(network, text)
        positions = positions_of(network, images)
        batches = batches_of_inputs(images.pixels, images.labels, images_at_once(network), positions)
        return evaluate_on_images(str(artifact), network, loss_of_network(network, None), batches, inputs=inputs)
    assert not isinstance(dense, Network)
    length = min(length, longest(network))
    return evaluate_artifact(
        str(artifact), str(dense), read_text(text), open_tokenizer(network), length=length, inputs=inputs, **options
    )


def compress(
    model: str | Path | Network | nn.Module,
    out: str | Path,
    *,
    batches: Any = None,
    evaluate: Any = None,
    progress: Progress | None = None,
    command: str = "",
    **options: Any,
) -> Result:
    """All acts in one: options are those of the command line, with underscores (``quality_loss="1%"``).

    model:    a checkpoint directory or hub id, an open network, or a module (with ``batches``).
    batches:  images or other float inputs to calibrate on, as ``layerwise.open`` takes them.
    evaluate: a held-out file, or such inputs with their labels.
    """
    network = None if isinstance(model, (str, Path)) else model
    if network is not None and not isinstance(network, Network):
        network = open_any(network, batches, options.pop("dtype", "auto"))
    if isinstance(network, ModuleNetwork) and batches is None and "calibrate" not in options:
        batches = network.pixels if network.labels is None else (network.pixels, network.labels)
    source = "images in memory"
    given = Given(
        network,
        None if batches is None else Images(source, *inputs_of(batches)),
        None
        if evaluate is None or isinstance(evaluate, (str, Path))
        else Images(f"held-out {source}", *inputs_of(evaluate)),
    )
    name = network.name if network is not None else str(model)
    text = str(evaluate) if isinstance(evaluate, (str, Path)) else None
    return run(Options(model=name, out=str(out), evaluate=text, **options), progress, command, given)
