"""A block as a tuner is given it: its linears in stored form, what goes in, and what should come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from layerwise.encoding.encoded import Encoded
from layerwise.tune.scope import Forward, TunedScope


@dataclass(frozen=True, eq=False)
class TunedBlock(TunedScope):
    """One block; its loss is the mean squared difference of its output from the dense block's.

    forward:  ``forward(weights [out, in], part)`` -> the block's output [sequences, length, width] with these
              weights in place of the stored ones; differentiable. Linears that are not named are as they are stored.
    target:   part -> the dense block's output there.
    counted:  part -> bool [sequences, length], False at padding; None where every token counts.
    """

    path: str
    encoded: Mapping[str, Encoded]
    weights: Mapping[str, Tensor]
    parts: int
    forward: Forward
    target: Callable[[int], Tensor]
    counted: Callable[[int], Tensor | None]
    seed: int

    def losses(self, weights: Mapping[str, Tensor], part: int) -> tuple[Tensor, int]:
        """(sum of squared differences from the dense output over a part's tokens, how many values that were)."""
        target = self.target(part)
        difference = self.forward(weights, part) - target
        counted = self.counted(part)
        if counted is not None:
            difference = difference[counted.to(difference.device)]
        return difference.square().sum(), difference.numel()
