"""A whole network as a tuner is given it: every block's linears in stored form, and the network's own loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from layerwise.encoding.encoded import Encoded
from layerwise.tune.scope import Forward, TunedScope


@dataclass(frozen=True, eq=False)
class TunedNetwork(TunedScope):
    """The network that the plan made, in memory; its loss is that of ``loss.py`` against the dense network.

    encoded:   site -> its stored form, of every block's linears that the tuner touches.
    forward:   ``forward(weights [out, in], part)`` -> what the loss compares: logits [terms, V], or unit vectors
               [texts, d]; differentiable. Everything that is not named is as it is stored.
    target:    part -> the dense network's output there, of the same shape.
    distances: two such outputs, the dense one first -> the loss of each term [terms].
    stepped:   called after every step.
    """

    encoded: Mapping[str, Encoded]
    weights: Mapping[str, Tensor]
    parts: int
    forward: Forward
    target: Callable[[int], Tensor]
    distances: Callable[[Tensor, Tensor], Tensor]
    stepped: Callable[[], None]
    seed: int

    def losses(self, weights: Mapping[str, Tensor], part: int) -> tuple[Tensor, int]:
        """(sum of the KL divergences or squared distances of a part's terms, how many terms those were)."""
        found = self.distances(self.target(part), self.forward(weights, part))
        return found.sum(), len(found)

    def advance(self) -> None:
        self.stepped()
