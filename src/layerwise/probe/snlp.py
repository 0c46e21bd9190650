"""SNLP: the hidden states after all blocks at once, by Newton's method with the identity for every block's Jacobian.

The states h_1 … h_N are the root of r_l = h_l - f_l(h_{l-1}). From a guess ĥ_l = h_0, one round evaluates all blocks
on the guesses, which are independent of one another, and corrects along the depth:

    o_l   = f_l(ĥ_{l-1})
    new_l = o_l + a (new_{l-1} - ĥ_{l-1}),  new_0 = h_0

With a = 1 and f_l = id + D_l that is new_l = h_0 + Σ_{i<=l} D_i(ĥ_{i-1}): a running sum. a = 0 is Jacobi's iteration,
the same without the correction. After k rounds the first k states are exact whatever a is, so N rounds are the network.

Measured: for each block, how many rounds its state needs until it is within ``tolerance`` (relative, mean over tokens)
of what the blocks give one after the other; and the network's loss with all blocks but the first ``prefix`` run in
1, 2, … rounds, with the correction and without. One round with a = 1 is the step ``sum`` of an arrangement, k rounds
are ``newton``, so a network can be saved and run that way (``deep_to_shallow``).

Source: "SNLP: Layer-Parallel Inference via Structured Newton Corrections", arXiv 2605.17842, and its public code, of
which the identity surrogate (IDN) from the h_0 guess is here. Choices of ours: the tolerance 0.01. No speed is claimed:
on a processor of few cores all blocks at once take as long as one after the other; what falls is the length of the
chain. The networks here were not trained with the paper's penalty, without which it promises less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from layerwise.probe._paths import Paths
from layerwise.roles import Probe
from layerwise.technique import BLOCK_INPUTS, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.passes import Calibration
    from layerwise.network.network import Network
    from layerwise.network.stack import Entered, Stack
    from layerwise.network.streaming import Batch
    from layerwise.probe._paths import Path
    from layerwise.probe.measurement import Measurement


@technique(
    paper="SNLP",
    needs={BLOCK_INPUTS},
    left_out="the training penalty that makes one or two rounds enough, fused chunks, several residual streams, and "
    "its states as a draft for lossless decoding",
)
class Snlp(Probe):
    """How many rounds of all blocks at once it takes until the states are those of the blocks in turn."""

    prefix: int = option(1, minimum=0, help="blocks that run one after the other first")
    tolerance: float = option(0.01, minimum=1e-6, maximum=1.0, help="relative error at which a state is found")

    def measure(self, network: Network, calibration: Calibration | None) -> Measurement:
        from layerwise.probe.measurement import Column, Compared, Curve, Curves, Measurement, Row

        paths = Paths(self.name, network, calibration)
        prefix = min(self.prefix, paths.count - 1)
        side = paths.count - prefix
        corrected, plain = errors(paths, prefix, 1.0), errors(paths, prefix, 0.0)
        rises = paths.rises(
            {
                _named(name, k): at_once(prefix, paths.count, k, a)
                for k in range(1, side + 1)
                for name, a in (("corrected", 1.0), ("Jacobi", 0.0))
            }
            | {"left out": lambda _s, _e, _b, states: states[prefix]}
        )
        rows = []
        for index, block in enumerate(network.tree.blocks):
            if index < prefix:
                rows.append(Row(block, (0, 0.0, 0.0, 0.0)))
                continue
            mine = [error[index - prefix] for error in corrected]
            needed = next(k for k, error in enumerate(mine, 1) if error <= self.tolerance or k == index - prefix + 1)
            rows.append(Row(block, (needed, mine[0], mine[min(1, side - 1)], plain[0][index - prefix])))
        unit, most = paths.loss.unit, max(int(row.values[0] or 0) for row in rows)
        one = (rises["corrected, 1 round"], rises["Jacobi, 1 round"])
        shown = min(2, side)
        metric = paths.loss.name
        return Measurement(
            str(self),
            "All blocks at once",
            network.name,
            network.architecture,
            (
                Column("rounds", "", f"until the state after it is within {self.tolerance:g} of the one in turn"),
                Column("1 round", "of its length", "relative error of its state after one round"),
                Column("2 rounds", "of its length", "the same after two"),
                Column("Jacobi, 1 round", "of its length", "after one round without the correction", detail=True),
            ),
            tuple(rows),
            f"All states are within {self.tolerance:g} after {most} rounds of {side} blocks at once; after one the "
            f"loss is {one[0]:.3g} {unit}, without the correction {one[1]:.3g}, with the blocks left out "
            f"{rises['left out']:.3g}.",
            "Fewer rounds are a shorter chain, not fewer operations, and the network was not trained for it.",
            (
                Curves(
                    "Loss by rounds", "All blocks but the first ones at once; as many rounds as blocks are exact.",
                    "rounds", unit,
                    (
                        Curve(
                            "with the correction and without",
                            tuple((k, max(rises[_named("corrected", k)], 1e-9)) for k in range(1, side + 1)), (),
                            tuple((k, max(rises[_named("Jacobi", k)], 1e-9)) for k in range(1, side + 1)),
                        ),
                    ),
                    "corrected", "", "Jacobi",
                ),
            ),
            {"tokens": paths.tokens, "blocks at once": side, "seed": paths.calibration.seed,
             **{name: f"{value:.4g}" for name, value in rises.items()}},
            (
                Compared(_named(f"{side} blocks, corrected", 1), one[0], "Jacobi, 1 round", one[1], metric),
                Compared(_named(f"{side} blocks, corrected", 1), one[0], "blocks left out", rises["left out"], metric),
                Compared(
                    _named(f"{side} blocks, corrected", shown), rises[_named("corrected", shown)],
                    _named("Jacobi", shown), rises[_named("Jacobi", shown)], metric,
                ),
            ),
        )  # fmt: skip


def at_once(prefix: int, count: int, k: int, correction: float) -> Path:
    """The path of ``k`` rounds of all blocks behind the first ``prefix``."""

    def path(stack: Stack, entered: Entered, batch: Batch, states: list[Tensor]) -> Tensor:
        return rounds(runner(stack, entered), states[prefix], range(prefix, count), k, correction)[-1]

    return path


def runner(stack: Stack, entered: Entered) -> Callable[[int, Tensor], Tensor]:
    """``run(block, hidden)`` for one batch."""
    return lambda index, hidden: stack.run(index, hidden, entered)


def _named(name: str, k: int) -> str:
    return f"{name}, {k} round{'s' * (k > 1)}"


def rounds(
    run: Callable[[int, Tensor], Tensor], hidden: Tensor, blocks: range, count: int, correction: float
) -> list[Tensor]:
    """Guesses of the states after each of ``blocks`` after ``count`` rounds from ``hidden``."""
    guess = [hidden] * len(blocks)
    for _ in range(count):
        before = [hidden, *guess[:-1]]
        outputs = [run(index, state) for index, state in zip(blocks, before, strict=True)]
        new: list[Tensor] = []
        for place, output in enumerate(outputs):
            moved = new[place - 1] - before[place] if place else None
            new.append(output if moved is None or correction == 0 else output + correction * moved)
        guess = new
    return guess


def errors(paths: Paths, prefix: int, correction: float) -> list[list[float]]:
    """``[rounds][block]``: mean over tokens of the relative error of the state after each block."""
    import torch

    side = paths.count - prefix
    totals, tokens = torch.zeros(side, side, dtype=torch.float64), 0
    with torch.inference_mode():
        for part in paths.parts:
            entered = paths.stack.enter(part)
            states = paths.stack.states(entered)
            for k in range(1, side + 1):
                found = rounds(runner(paths.stack, entered), states[prefix], range(prefix, paths.count), k, correction)
                for place, state in enumerate(found):
                    right = states[prefix + place + 1][part.counted].double()
                    off = (state[part.counted].double() - right).norm(dim=-1)
                    totals[k - 1, place] += (off / right.norm(dim=-1).clamp_min(1e-30)).where(off > 0, 0.0).sum()
            tokens += int(part.counted.sum())
    found_all = (totals / max(1, tokens)).tolist()
    return [[float(v) for v in row] for row in found_all]
