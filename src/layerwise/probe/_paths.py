"""What the probes of depth share: the loss of a network whose blocks are run in another way, all in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from layerwise.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.passes import Calibration
    from layerwise.network.network import Network
    from layerwise.network.stack import Entered, Stack
    from layerwise.network.streaming import Batch

    Path = Callable[[Stack, Entered, Batch, list[Tensor]], Tensor]
    """``path(stack, entered, batch, states) -> last hidden state``; ``states``: the network's own at all boundaries."""

TOKENS = 1024
PIECE = 1 << 21  # values of the outputs compared at a time


class Paths:
    """The first tokens of the judge split, and the loss against the network as it is along other paths."""

    def __init__(self, probe: str, network: Network, calibration: Calibration | None, tokens: int = TOKENS) -> None:
        from layerwise.calibrate.splits import first_tokens
        from layerwise.network.network import output_width
        from layerwise.network.stack import Stack
        from layerwise.network.streaming import rows_at_once

        if calibration is None:
            raise InputError(f"{probe} runs the network on text; give it a calibration of the network")
        self.probe, self.calibration, self.loss = probe, calibration, calibration.loss
        self.stack = Stack(network, calibration.device)
        self.count = len(network.tree.blocks)
        width = output_width(network)
        self.parts = [
            batch.rows(start, stop)
            for batch in first_tokens(calibration.splits.judge, tokens)
            for start, stop in rows_at_once(batch, width, PIECE)
        ]

    @property
    def tokens(self) -> int:
        return sum(int(part.counted.sum()) for part in self.parts)

    def rises(self, paths: Mapping[str, Path]) -> dict[str, float]:
        """Mean loss per term along each path; raises ``InputError`` where it is not a number."""
        import torch

        totals, terms = dict.fromkeys(paths, 0.0), 0
        with torch.inference_mode():
            for part in self.parts:
                entered = self.stack.enter(part)
                states = self.stack.states(entered)
                dense = self.loss.target(self.stack.leave(part, states[-1]), part)
                terms += self.loss.terms(part)
                for name, path in paths.items():
                    reached = path(self.stack, entered, part, states)
                    other = self.loss.target(self.stack.leave(part, reached), part)
                    totals[name] += float(self.loss.distances(dense, other).double().sum())
        found = {name: max(0.0, total / max(1, terms)) for name, total in totals.items()}
        wrong = next((name for name, value in found.items() if not math.isfinite(value)), None)
        if wrong is not None:
            raise InputError(f"{self.probe} finds no finite loss for the network run with {wrong}")
        return found
