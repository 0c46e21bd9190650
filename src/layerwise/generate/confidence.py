"""Whether one more drafted token pays, by how sure the draft is of it.

    p        the largest probability in the draft's own distribution
    r        kept / hoped: of tokens that were tried, how many were kept over the sum of their p, older rounds fading
    c        bytes read for one more token of the draft over those of a plain token
    draft the next token while   min(1, r p_1) · … · min(1, r p_k) >= c

A token is worth a plain one if it and all before it are kept, which is what the left side estimates. How sure the draft
is hangs on what stands before its token and never on the token, so that drawn texts keep the network's distribution.
Networks that were not trained to be read early may be sure of nonsense: r brings that down, and where no p <= 1 reaches
c, there is nothing to draft.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

FORGET = 0.95  # of what was seen, from round to round


@dataclass
class Confidence:
    """What is known about a draft while a text is decoded; ``price`` is c."""

    price: float
    kept: float
    hoped: float
    path: float = 1.0
    tried: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return self.kept / self.hoped

    @property
    def possible(self) -> bool:
        """Whether a draft that is certain would pay."""
        return self.ratio >= self.price

    def begin(self) -> None:
        """A round begins."""
        self.path, self.tried = 1.0, []

    def pays(self, sure: float = 1.0) -> bool:
        """Whether a token behind those that were taken pays, if the draft is so sure of it."""
        return self.path * min(1.0, self.ratio * sure) >= self.price

    def took(self, sure: float) -> None:
        """A token was drafted."""
        self.path *= min(1.0, self.ratio * sure)
        self.tried.append(sure)

    def told(self, accepted: int) -> None:
        """How many of the round's tokens were kept. Those behind the first that was not say nothing."""
        if self.tried:
            self.kept = FORGET * self.kept + accepted
            self.hoped = FORGET * self.hoped + sum(self.tried[: accepted + 1])


def sureness(scores: Tensor) -> float:
    """p, from the draft's scores ``[words]``."""
    return float(scores.float().softmax(-1).amax())
