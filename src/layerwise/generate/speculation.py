"""Draft and verify: tokens are proposed cheaply and confirmed by one pass of the whole network.

A round begins with x_1 … x_n known and the keys and values of x_1 … x_{n-1} in the cache. A draft proposes y_1 … y_g;
one pass over [x_n, y_1 … y_g] gives the network's scores behind each of them, z_0 … z_g.

    greedy    a_i = argmax z_i;  m = the leading i with y_{i+1} = a_i;  y_1 … y_m and a_m join the text
    drawn     y_{i+1} ~ q_i is kept with probability min(1, p_i(y) / q_i(y)); the first that is not is replaced by a
              draw from max(0, p_i - q_i), normalised; if all are kept, one more is drawn from p_g

So each round adds m + 1 tokens. Greedily they are those of plain decoding, since a_0 … a_m were computed from the very
prefix that it would have had; drawn ones have the network's distribution: q(y) min(1, p/q) + (1 - sum min(p, q)) r(y) =
p(y) for every y. A draft without a distribution counts as certain of its token. Then the cache is rolled back to n + m
positions. Rows accept different numbers of tokens, so texts are decoded one after the other.

Source: the loop of Y. Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from layerwise.generate.choice import Chooser
from layerwise.generate.session import Session
from layerwise.generate.wanted import Wanted, Work


@dataclass(frozen=True)
class Proposal:
    """What a draft hands over.

    tokens:  y_1 … y_g.
    likely:  q_0 … q_{g-1}, float64 [g, words], or None for a draft that is certain of its tokens.
    hidden:  states of [x_n, y_1 … y_g] behind the first ``depth`` blocks, [1, g + 1, d], whose keys and values of these
             blocks are written; None where verification starts at the first block.
    block_passes: blocks that were run for it.
    """

    tokens: Sequence[int]
    likely: Tensor | None = None
    hidden: Tensor | None = None
    depth: int = 0
    block_passes: int = 0


class Draft(Protocol):
    """Proposes tokens. It may run blocks of the session at its length and behind; it must not change the length."""

    def propose(self, session: Session, last: int, count: int, chooser: Chooser) -> Proposal:
        """``count`` >= 1 tokens that may follow ``last``, which is not in the cache yet; fewer are allowed."""

    def confirmed(self, tokens: Sequence[int], hidden: Tensor) -> None:
        """Told after each round: the tokens that joined, and the last block's states [1, m + 1, d] that chose them."""


class Pace(Protocol):
    """How many tokens to propose."""

    def count(self) -> int:
        """For the next round; 0 for a plain step."""

    def seen(self, drafted: int, accepted: int) -> None:
        """What came of a round."""


@torch.inference_mode()
def speculate(
    session: Session,
    first: int,
    draft: Draft,
    pace: Pace,
    chooser: Chooser,
    wanted: Wanted,
    work: Work,
    emit: Callable[[Sequence[int]], None],
) -> list[int]:
    """All new tokens of a session of one row whose prompt is in the cache; ``first`` was chosen behind the prompt."""
    network = session.network
    text, over = wanted.cut(network, 0, [first])
    emit(text)
    while not over:
        count = min(pace.count(), wanted.new_tokens - len(text) - 1)  # the round's last token needs no draft
        proposal = draft.propose(session, text[-1], count, chooser) if count > 0 else Proposal(())
        scores, hidden = verify(session, text[-1], proposal)
        accepted, token = judge(scores, proposal, chooser)
        session.rollback([session.lengths[0] + accepted + 1])
        kept, over = wanted.cut(network, len(text), [*proposal.tokens[:accepted], token])
        text += kept
        emit(kept)
        draft.confirmed(kept, hidden[:, : accepted + 1])
        pace.seen(len(proposal.tokens), accepted)
        work.full_passes += 1
        work.block_passes += proposal.block_passes + len(network.blocks) - proposal.depth
        work.drafted += len(proposal.tokens)
        work.accepted += accepted
    return text


def verify(session: Session, last: int, proposal: Proposal) -> tuple[Tensor, Tensor]:
    """The network's scores ``[g + 1, words]`` behind the last token and every proposed one, and its last states.

    Writes keys and values of all blocks at the session's length and behind; the length stays.
    """
    blocks, starts = len(session.network.blocks), session.lengths
    hidden = proposal.hidden
    if hidden is None:
        hidden = session.embed(torch.tensor([[last, *proposal.tokens]]), starts)
    hidden = session.run(hidden, range(proposal.depth, blocks), starts)
    return session.scores(hidden)[0], hidden


def judge(scores: Tensor, proposal: Proposal, chooser: Chooser) -> tuple[int, int]:
    """(how many proposed tokens are kept, the token behind them)."""
    if chooser.choice.greedy:
        best = scores.argmax(-1).tolist()
        kept = leading(proposal.tokens, best)
        return kept, best[kept]
    wanted = chooser.choice.probabilities(scores)
    for place, token in enumerate(proposal.tokens):
        mine = float(wanted[place, token])
        theirs = 1.0 if proposal.likely is None else float(proposal.likely[place, token])
        if chooser.uniform() * theirs < mine:
            continue
        rest = wanted[place].clone()
        if proposal.likely is None:
            rest[token] = 0
        else:
            rest = (rest - proposal.likely[place]).clamp(min=0)
        # A token is refused only where p < q, so that p > q elsewhere; rounding may leave nothing of it.
        return place, chooser.draw(rest if bool((rest > 0).any()) else wanted[place])
    return len(proposal.tokens), chooser.draw(wanted[-1])


def leading(proposed: Sequence[int], chosen: Sequence[int]) -> int:
    """How many proposed tokens are what the network chose, before the first that is not."""
    pairs = zip(proposed, chosen, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), len(proposed))
