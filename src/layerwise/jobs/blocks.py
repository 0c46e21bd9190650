"""The act *depth*: what each block of a network is worth, measured by running the network with its blocks arranged.

    skip       the block is left out: its input goes straight to the next
    swap       it changes places with the next one
    parallel   it and the next are given the same hidden state, and what both add is added: ``h + D_l(h) + D_l+1(h)``
    loop       it runs twice

Each is a rise of the network's own loss against the network as it is (KL per token or example, squared distance of a
text's vector), on tokens of the judge split, and, for a network that predicts the next token, a perplexity. The table
also has what a block's removal would save: its bytes as they are stored and its share of the time of all blocks. Costs
of single blocks do not add up; two that are cheap alone may be dear together.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from layerwise.calibrate.passes import Calibration
from layerwise.calibrate.splits import first_tokens
from layerwise.evaluate.compare import Sums
from layerwise.network.arrangement import Step
from layerwise.network.network import Network, output_width
from layerwise.network.stack import Stack
from layerwise.network.streaming import Batch, rows_at_once
from layerwise.probe.measurement import Bars, Column, HeatMap, Measurement, Row

TOKENS = 2048
KINDS = ("skip", "swap", "parallel", "loop")
ROUNDS = 5  # in which blocks are timed in turn


def steps_of(kind: str, index: int, count: int) -> tuple[Step, ...] | None:
    """The steps from block ``index`` on when it is skipped, swapped, beside the next, or looped; None at the end."""
    rest = [Step((i,)) for i in range(index + 1, count)]
    if kind == "skip":
        return tuple(rest)
    if kind == "loop":
        return (Step((index,)), Step((index,)), *rest)
    if index + 1 >= count:
        return None
    if kind == "swap":
        return (Step((index + 1,)), Step((index,)), *rest[1:])
    return (Step((index, index + 1)), *rest[1:])


@torch.inference_mode()
def measure_blocks(
    calibration: Calibration, tokens: int = TOKENS, advance: Callable[[], None] = lambda: None
) -> Measurement:
    """Every block's worth, on the first ``tokens`` tokens of the judge split; the network is in memory whole.

    ``advance`` is called once a block and batch. Raises ``InputError`` for a network without a list of blocks.
    """
    network, loss = calibration.network, calibration.loss
    stack, count = Stack(network, calibration.device), len(network.tree.blocks)
    batches = first_tokens(calibration.splits.judge, tokens)
    sums = {(kind, i): Sums() for i in range(count) for kind in KINDS if steps_of(kind, i, count) is not None}
    for batch in batches:
        for start, stop in rows_at_once(batch, output_width(network)):
            part = batch.rows(start, stop)
            entered = stack.enter(part)
            states = stack.states(entered)
            dense = loss.target(stack.leave(part, states[-1]), part)
            for (kind, index), found in sums.items():
                hidden = states[index]
                for step in steps_of(kind, index, count) or ():
                    hidden = stack.step(step, hidden, entered)
                found.add(loss, part, dense, loss.target(stack.leave(part, hidden), part))
        advance()
    costs = {place: found.measured(loss).metrics for place, found in sums.items()}
    perplexity = next(iter(sums.values())).dense_measured(loss).metrics.get("perplexity")
    return _measurement(network, calibration, batches, costs, perplexity, _shares(stack, batches[0]))


def _shares(stack: Stack, batch: Batch) -> list[float]:
    """Each block's share of the time of all blocks, on one sequence: medians of rounds in which they take turns."""
    part = batch.rows(0, 1)
    entered = stack.enter(part)
    states = stack.states(entered)
    seconds: list[list[float]] = [[] for _ in stack.blocks]
    for _ in range(ROUNDS):
        for index, state in enumerate(states[:-1]):
            begun = time.perf_counter()
            stack.run(index, state, entered)
            seconds[index].append(time.perf_counter() - begun)
    medians = [statistics.median(s) for s in seconds]
    return [m / sum(medians) for m in medians]


def _measurement(
    network: Network,
    calibration: Calibration,
    batches: Sequence[Batch],
    costs: dict[tuple[str, int], dict[str, float]],
    perplexity: float | None,
    shares: list[float],
) -> Measurement:
    loss, blocks = calibration.loss, network.tree.blocks
    names = tuple(b.rpartition(".")[2] for b in blocks)
    values = {place: found[loss.name] for place, found in costs.items()}
    help_of = {
        "skip": "the block is left out",
        "swap": "it changes places with the next one",
        "parallel": "it and the next are given the same state, and what they add is summed",
        "loop": "it runs twice",
    }
    columns = [Column(kind, loss.unit, help_of[kind]) for kind in KINDS]
    if perplexity is not None:
        columns += [
            Column(f"{kind}: perplexity", "", f"of the network when {help_of[kind]}", detail=kind != "skip")
            for kind in KINDS
        ]
    columns += [
        Column("bytes", "MB", "what its parameters take in the checkpoint"),
        Column("time", "% of all blocks", "on one sequence, as measured here", digits=2),
    ]
    rows = []
    for i, block in enumerate(blocks):
        figures: list[float | None] = [values.get((kind, i)) for kind in KINDS]
        if perplexity is not None:
            figures += [costs[kind, i]["perplexity"] if (kind, i) in costs else None for kind in KINDS]
        rows.append(Row(block, (*figures, block_bytes(network, block) / 1e6, 100 * shares[i])))
    grid = tuple(tuple(values.get((kind, i)) for kind in KINDS) for i in range(len(blocks)))
    labels = tuple(f"block {n}" for n in names)
    data = {
        "tokens": sum(int(b.counted.sum()) for b in batches),
        "loss": loss.unit,
        **({"perplexity as it is": f"{perplexity:.4g}"} if perplexity is not None else {}),
        "seed": calibration.seed,
    }
    return Measurement(
        "depth",
        "What each block is worth",
        network.name,
        network.architecture,
        tuple(columns),
        tuple(rows),
        _summary(names, values, perplexity, costs, loss.unit),
        "Each figure is one change alone: two blocks that are cheap apart may be dear together. Measure the finished "
        "network, as layerwise reshape and compress do.",
        (
            Bars(
                "What it costs to leave a block out",
                "Rise of the loss when the block is skipped, and, as a mark, when it runs twice.",
                labels, tuple(values["skip", i] for i in range(len(blocks))), loss.unit,
                tuple(values["loop", i] for i in range(len(blocks))), "run twice",
            ),
            HeatMap(
                "Skipped, swapped, in parallel, looped",
                "Rise of the loss for each change of each block; the last has no next one.",
                names, KINDS, grid, loss.unit, empty="",
            ),
        ),
        data,
    )  # fmt: skip


def block_bytes(network: Network, block: str) -> int:
    """What a block's parameters take as the checkpoint stores them."""
    part = network.module.get_submodule(block)
    places = [(p, network.stored.place(f"{block}.{name}")) for name, p in part.named_parameters()]
    return sum(p.numel() * info.dtype.itemsize for p, info in places)


def _summary(
    names: Sequence[str],
    values: dict[tuple[str, int], float],
    perplexity: float | None,
    costs: dict[tuple[str, int], dict[str, float]],
    unit: str,
) -> str:
    def least(kind: str) -> tuple[str, float, int]:
        place = min((p for p in values if p[0] == kind), key=lambda p: values[p])
        return names[place[1]], values[place], place[1]

    name, cost, index = least("skip")
    text = f"Block {name} is the cheapest to leave out ({cost:.3g} {unit}"
    if perplexity is not None and math.isfinite(perplexity):
        text += f", perplexity {perplexity:.3g} to {costs['skip', index]['perplexity']:.3g}"
    text += ")"
    said = {"swap": "to swap with the next", "parallel": "to run beside the next", "loop": "to run twice"}
    for kind, words in said.items():
        if any(p[0] == kind for p in values):
            name, cost, _ = least(kind)
            text += f"; {name} is the cheapest {words} ({cost:.3g})"
    return text + "."
