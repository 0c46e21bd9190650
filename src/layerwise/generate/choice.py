"""How tokens are chosen from scores: greedily, or drawn at a temperature from the most likely words.

    greedy        argmax, the lowest id among equals
    temperature   p = softmax(z / T)
    top-k         the k most likely words, ties by lowest id, renormalised
    top-p         the fewest most likely words whose probabilities reach p, renormalised

Draws are by the inverse of the distribution function from one uniform number of a text's own generator, seeded by the
run's seed and the text's place, so that a text does not depend on what it is generated beside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.errors import InputError


@dataclass(frozen=True)
class Choice:
    """Options of choosing; a temperature of 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"the temperature must be 0 (greedy) or above, not {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top-k must be a number of words, or 0 for all, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p must be above 0 and at most 1, not {self.top_p}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, scores: Tensor) -> Tensor:
        """Distribution over the words, float64 ``[…, words]``; all on one word when greedy."""
        if self.greedy:
            best = scores.argmax(-1, keepdim=True)
            return torch.zeros(scores.shape, dtype=torch.float64, device=scores.device).scatter_(-1, best, 1.0)
        likely = (scores.double() / self.temperature).softmax(-1)
        if 0 < self.top_k < likely.shape[-1] or self.top_p < 1:
            ordered, order = likely.sort(dim=-1, descending=True, stable=True)
            if self.top_k:
                ordered[..., self.top_k :] = 0
            before = ordered.cumsum(-1) - ordered
            ordered = torch.where(before < self.top_p * ordered.sum(-1, keepdim=True), ordered, 0)
            likely = torch.zeros_like(likely).scatter_(-1, order, ordered)
            likely = likely / likely.sum(-1, keepdim=True)
        return likely

    def chooser(self, row: int = 0) -> Chooser:
        """What chooses the tokens of one text."""
        return Chooser(self, torch.Generator().manual_seed((self.seed * 1_000_003 + row) % (1 << 63)))


class Chooser:
    """Chooses one text's tokens, with random numbers of its own."""

    def __init__(self, choice: Choice, generator: torch.Generator) -> None:
        self.choice, self.generator = choice, generator

    def pick(self, scores: Tensor) -> int:
        """A token by its scores ``[words]``."""
        return int(scores.argmax(-1)) if self.choice.greedy else self.draw(self.choice.probabilities(scores))

    def draw(self, distribution: Tensor) -> int:
        """A token by its probabilities ``[words]``, which need not sum to one."""
        steps = distribution.double().cumsum(-1)
        target = self.uniform() * float(steps[-1])
        found = int(torch.searchsorted(steps, torch.tensor(target, device=steps.device), right=True))
        if found < len(steps) and distribution[found] > 0:
            return found
        return int(distribution.nonzero()[-1])  # rounding at the very end

    def uniform(self) -> float:
        """A number in [0, 1)."""
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))
