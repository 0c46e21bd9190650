"""Deep-to-shallow parallelisation: runs of blocks one after the other become blocks side by side.

A residual stack is a product of (I + F_l); multiplied out it is the sum over all subsets of blocks of the product of
their F_l. Leaving the products out leaves one broad layer:

    order 1    y = x + Σ_l F_l(x)
    order 2    y = x + Σ_l F_l(x + Σ_{j<l} F_j(x))     the products of two, and more where F is not linear

F_l is what block l adds. Order 1 is one round of the identity-Newton iteration and order 2 two of them
(``network/arrangement.py``: ``sum`` and ``newton``), so the result is saved as an arrangement: the same bytes, a
shorter chain of blocks that wait for each other (``Arrangement.serial``).

Which runs of ``blocks`` neighbours are put side by side is measured: the run that raises the network's own loss least
on judge tokens, then the next one beside it, ``groups`` times.

Source: "Make Deep Networks Shallow Again", arXiv 2309.08414, which trains sequential and parallel twins of convolutions
from scratch and finds them alike on easy sets. Completion of ours: the truncation of a *trained* network, order 2, and
the choice of runs. A trained network is hurt by it, since later blocks were trained on what earlier ones added; it is
held against averaging what the blocks add (``mean=true``, which the expansion does not say). On docs-lm two blocks side
by side cost 0.087 nats of KL (averaged 0.205), where leaving one out costs 0.265; three at order 1 cost more than that
(0.458, averaged 0.756), at order 2 0.038. No speed is claimed on few cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from layerwise.errors import InputError
from layerwise.roles import NetworkSurgeon
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from layerwise.calibrate.passes import Calibration
    from layerwise.engine.progress import Progress
    from layerwise.network.arrangement import Step
    from layerwise.network.network import Network
    from layerwise.network.stack import Entered, Stack

TOKENS = 1024


@technique(
    paper="Deep-to-shallow parallelisation",
    menu=("blocks=2", "blocks=3", "blocks=3,order=2"),
    left_out="twins trained from scratch in both layouts: networks are parallelised after training",
)
class DeepToShallow(NetworkSurgeon):
    """Neighbouring blocks that run side by side."""

    rivals: ClassVar[tuple[str, ...]] = ("deep_to_shallow:blocks=2,mean=true", "deep_to_shallow:blocks=3,mean=true")

    blocks: int = option(2, minimum=2, help="neighbours that run side by side")
    groups: int = option(1, minimum=1, help="how many such runs")
    order: int = option(1, choices=(1, 2), help="1: all on the same state; 2: once more with what the others added")

    mean: bool = option(False, help="average what the blocks add instead of adding it up, at order 1")

    def operate(self, network: Network, calibration: Calibration, progress: Progress) -> Network:
        from layerwise.network.arranged import arranged
        from layerwise.network.arrangement import Arrangement

        count = len(network.tree.blocks)
        if self.blocks * self.groups > count:
            raise InputError(
                f"{self} needs {self.blocks * self.groups} blocks, and {network.name} has {count}; take fewer"
            )
        if self.order == 2 and self.blocks < 3:
            raise InputError(f"{self} would compute what the network does: order 2 of two blocks is exact; take three")
        with progress.stage("measure runs of blocks", self.groups) as advance:
            chosen: list[int] = []
            measured = _Measured(network, calibration)
            for _ in range(self.groups):
                taken = {i for start in chosen for i in range(start, start + self.blocks)}
                free = [
                    start
                    for start in range(count - self.blocks + 1)
                    if not taken & set(range(start, start + self.blocks))
                ]
                if not free:
                    raise InputError(f"{self} finds no run of {self.blocks} blocks left in {network.name}; take fewer")
                rises = measured.rises([self.steps(count, (*chosen, start)) for start in free])
                chosen.append(free[min(range(len(free)), key=lambda i: (rises[i], i))])
                advance()
        return arranged(network, Arrangement(self.steps(count, chosen)))

    def steps(self, count: int, starts: Sequence[int]) -> tuple[Step, ...]:
        """The network of ``count`` blocks with the runs from ``starts`` on side by side."""
        from layerwise.network.arrangement import Step

        found, index = [], 0
        while index < count:
            if index in starts:
                run = tuple(range(index, index + self.blocks))
                found.append(Step(run, "newton", 2) if self.order == 2 else Step(run, "mean" if self.mean else "sum"))
                index += self.blocks
            else:
                found.append(Step((index,)))
                index += 1
        return tuple(found)


class _Measured:
    """The network's own loss when its blocks run another way, on judge tokens, all in memory."""

    def __init__(self, network: Network, calibration: Calibration) -> None:
        from layerwise.calibrate.splits import first_tokens
        from layerwise.network.network import output_width
        from layerwise.network.stack import Stack
        from layerwise.network.streaming import rows_at_once

        self.loss, self.stack = calibration.loss, Stack(network, calibration.device)
        width = output_width(network)
        self.parts = [
            batch.rows(start, stop)
            for batch in first_tokens(calibration.splits.judge, TOKENS)
            for start, stop in rows_at_once(batch, width)
        ]

    def rises(self, ways: Sequence[tuple[Step, ...]]) -> list[float]:
        import torch

        totals = [0.0] * len(ways)
        with torch.inference_mode():
            for part in self.parts:
                entered = self.stack.enter(part)
                dense = self.loss.target(self.stack.leave(part, self.stack.states(entered)[-1]), part)
                for place, steps in enumerate(ways):
                    reached = run_steps(self.stack, entered, steps)
                    other = self.loss.target(self.stack.leave(part, reached), part)
                    totals[place] += float(self.loss.distances(dense, other).double().sum())
        return totals


def run_steps(stack: Stack, entered: Entered, steps: Sequence[Step]):  # type: ignore[no-untyped-def]
    """The last hidden state behind these steps."""
    hidden = entered.hidden
    for step in steps:
        hidden = stack.step(step, hidden, entered)
    return hidden
