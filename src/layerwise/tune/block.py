"""What a tuner is given: one block with its linears in stored form, what goes in, and what should come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.encoding.encoded import Encoded

Forward = Callable[[Mapping[str, Tensor], int], Tensor]


@dataclass(frozen=True, eq=False)
class TunedBlock:
    """A block as a function of its linears' weights, on calibration sequences cut into ``parts``.

    encoded:  path of a linear in the block -> its stored form.
    weights:  the same paths -> the dense matrix that the form stands for, [out, in] float32.
    parts:    how many parts there are; a part is a few sequences of one length.
    forward:  ``forward(weights [out, in], part)`` -> the block's output [sequences, length, width] with these
              weights in place of the stored ones; differentiable. Linears that are not named are as they are stored.
    target:   part -> the dense block's output there.
    counted:  part -> bool [sequences, length], False at padding; None where every token counts.
    seed:     of every draw a tuner makes for this block.
    """

    path: str
    encoded: Mapping[str, Encoded]
    weights: Mapping[str, Tensor]
    parts: int
    forward: Forward
    target: Callable[[int], Tensor]
    counted: Callable[[int], Tensor | None]
    seed: int

    def squares(self, weights: Mapping[str, Tensor], part: int) -> tuple[Tensor, int]:
        """(sum of squared differences from the dense output over a part's tokens, how many values that were)."""
        target = self.target(part)
        difference = self.forward(weights, part) - target
        counted = self.counted(part)
        if counted is not None:
            difference = difference[counted.to(difference.device)]
        return difference.square().sum(), difference.numel()

    @torch.no_grad()
    def error(self, encoded: Mapping[str, Encoded]) -> float:
        """Mean squared error of the block's output over all parts, with these stored forms."""
        weights = {path: form.decode() for path, form in encoded.items()}
        total, count = 0.0, 0
        for part in range(self.parts):
            squares, values = self.squares(weights, part)
            total, count = total + float(squares), count + values
        return total / max(1, count)


@dataclass(frozen=True, eq=False)
class Tuned:
    """What a tuner returns: the forms that it changed, by path, and the block's mean squared error on all parts."""

    encoded: dict[str, Encoded]
    before: float
    after: float
