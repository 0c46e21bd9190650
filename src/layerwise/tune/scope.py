"""What tuners work on, a block or a network: stored forms, the loss as a function of their weights, the result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.encoding.encoded import Encoded

Forward = Callable[[Mapping[str, Tensor], int], Tensor]


class TunedScope(ABC):
    """A block or a network as a function of its linears' weights, on calibration sequences cut into ``parts``.

    encoded:  path of a linear in the scope -> its stored form.
    weights:  the same paths -> the dense matrix that the form stands for, [out, in] float32.
    parts:    how many parts there are; a part is a few sequences of one length.
    seed:     of every draw a tuner makes here.
    """

    encoded: Mapping[str, Encoded]
    weights: Mapping[str, Tensor]
    parts: int
    seed: int

    @abstractmethod
    def losses(self, weights: Mapping[str, Tensor], part: int) -> tuple[Tensor, int]:
        """(sum of the loss's terms on a part, how many terms that were), differentiable in ``weights`` [out, in].

        Linears that are not named are as they are stored.
        """

    def advance(self) -> None:  # noqa: B027
        """Say that a step is done; nobody listens inside a block."""

    @torch.no_grad()
    def error(self, encoded: Mapping[str, Encoded]) -> float:
        """Mean of the loss's terms over all parts, with these stored forms."""
        weights = {path: form.decode() for path, form in encoded.items()}
        total, count = 0.0, 0
        for part in range(self.parts):
            losses, terms = self.losses(weights, part)
            total, count = total + float(losses), count + terms
        return total / max(1, count)


@dataclass(frozen=True, eq=False)
class Tuned:
    """What a tuner returns: the forms that it changed, by path, and the scope's error over all parts."""

    encoded: dict[str, Encoded]
    before: float
    after: float
