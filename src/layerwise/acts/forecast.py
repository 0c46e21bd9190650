"""Before the work: the sizes a run can reach, and about how much time, memory and disk it will take.

Sizes come from shapes and are exact. Time is a model, not a measurement of the run: the multiplications of the passes
over the machine's rate, measured here for a tenth of a second, and a rate per weight for the encoders.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from layerwise.acts.disk import disk_needed
from layerwise.acts.prepare import Options, Prepared, longest, prepare, recipes_for
from layerwise.acts.wanted import predicts
from layerwise.calibrate.reverse import DRAWS
from layerwise.calibrate.splits import tokens_in
from layerwise.network.network import output_width
from layerwise.recipe import parse_tuner
from layerwise.report.figures import duration, megabytes

SECONDS_PER_WEIGHT = 2.5e-7  # one candidate of the slowest encoder, one thread
TRAINED_VALUES = 12  # float32 a weight that a whole network in training holds: latent, moments, codes, gradients
PROCESS_BYTES = 450_000_000  # torch and transformers, loaded


@dataclass(frozen=True)
class Forecast:
    """Bytes, seconds."""

    network: str
    parameters: int
    dense: int
    smallest: int
    largest: int
    budget: int | None
    seconds: float
    memory: int
    disk: int
    calibration_tokens: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        bpw = lambda size: f"{megabytes(size)}, {8 * size / self.parameters:.2f} bpw"  # noqa: E731
        rows = [
            ("network", f"{self.network}, {self.parameters:,} parameters"),
            ("size now", bpw(self.dense)),
            ("smallest file", bpw(self.smallest)),
            ("largest file", bpw(self.largest)),
        ]
        if self.budget is not None:
            rows.append(("budget", bpw(self.budget)))
        return [
            *rows,
            ("calibration", f"{self.calibration_tokens:,} tokens"),
            ("time", f"about {duration(self.seconds)}"),
            ("memory", f"about {megabytes(self.memory)}"),
            ("disk while working", f"about {megabytes(self.disk)}"),
        ]


def forecast(options: Options) -> Forecast:
    """Check everything as a run would, and say what the run would take."""
    prepared = prepare(options)
    network = prepared.network
    wanted = prepared.budget
    return Forecast(
        network=network.name,
        parameters=network.tree.parameters,
        dense=network.checkpoint.safetensors_bytes,
        smallest=prepared.range.smallest,
        largest=prepared.range.largest,
        budget=wanted.bytes(network.tree.parameters, network.checkpoint.safetensors_bytes) if wanted else None,
        seconds=seconds_needed(prepared),
        memory=memory_needed(prepared),
        disk=disk_needed(prepared),
        calibration_tokens=tokens_in(prepared.splits.all),
    )


def seconds_needed(prepared: Prepared) -> float:
    network, options = prepared.network, prepared.options
    linears = sum(s.parameters for s in network.tree.sites if s.kind in ("linear", "head") or s.head)
    fitted = tokens_in((*prepared.splits.fit, *prepared.splits.judge))
    backwards = fitted * (1 + DRAWS) if predicts(prepared) else 0
    passes = 2 * linears * (tokens_in(prepared.splits.all) + backwards)
    passes += 2 * linears * tokens_in(prepared.evaluation.batches) * 3
    if options.tune:
        tuner = parse_tuner(options.tune)
        trained = linears if tuner.scope == "network" else sum(s.parameters for s in network.tree.sites if s.block)
        passes += 6 * trained * tuner.passes() * tuner.sequences * min(options.length, longest(network))
    encoding = sum(
        s.parameters * SECONDS_PER_WEIGHT
        for s in network.tree.sites
        for _ in recipes_for(s, prepared.menu, prepared.only, network)
    )
    return 5.0 + 1.5 * passes / multiplications_per_second(options.threads) + encoding / options.workers


def memory_needed(prepared: Prepared) -> int:
    """A block with its statistics and candidates, the workers' copies of the largest site, and the process itself.

    A tuner of network scope holds the whole network, and what it learns of it, instead of a block.
    """
    network, workers = prepared.network, prepared.options.workers
    largest_block = max(
        sum(4 * (s.parameters + 2 * (s.rows**2 + s.columns**2)) for s in network.tree.of_block(block))
        for block in network.tree.blocks or (None,)
    )
    largest_site = max(4 * s.parameters for s in network.tree.sites)
    tuner = parse_tuner(prepared.options.tune) if prepared.options.tune else None
    if tuner is not None and tuner.scope == "network":
        inside = sum(s.parameters for s in network.tree.sites if s.block)
        tokens = tuner.sequences * min(prepared.options.length, longest(network))
        outputs = 6 * 4 * tokens * output_width(network)  # both networks' logits, their logarithms and gradients
        largest_block = max(largest_block, 4 * network.tree.parameters + TRAINED_VALUES * 4 * inside + outputs)
    return PROCESS_BYTES + largest_block + (2 + 3 * workers) * largest_site


def multiplications_per_second(threads: int) -> float:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a = torch.ones(512, 512)
        a @ a
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < 0.1:
            a @ a
            count += 1
        return 2 * 512**3 * count / (time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
