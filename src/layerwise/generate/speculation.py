"""Draft and verify: tokens are proposed cheaply and confirmed by one pass of the whole network.

A round begins with x_1 … x_n known and the keys and values of x_1 … x_{n-1} in the cache. A draft proposes a chain of
tokens, or several continuations at once, the nodes of a tree (``branches.py``); one pass over x_n and all of them gives
the network's scores behind each. Then tokens are chosen from node 0 = x_n on: where what is chosen is a child, the walk
goes on there, else the round is over. A walk past m nodes adds m + 1 tokens.

    greedy   the token with the best score: plain decoding's, since the scores behind a node are those of its path alone
    drawn    of a draft that is certain of its tokens: the network's own draw by the text's own chooser, one random
             number a token, so that texts are plain decoding's draws. Found among k children with probability sum of p
    drawn    of a draft y ~ q: y is kept with probability min(1, p(y) / q(y)); what is not is replaced by a draw from
             max(0, p - q), normalised; q(y) min(1, p/q) + (1 - sum min(p, q)) r(y) = p(y) for every y

The keys and values of the chosen nodes are moved together, for a path through a tree has gaps, and the cache is rolled
back to them. Rows accept different numbers of tokens, so texts are decoded one after the other.

Source: the loop of Y. Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from layerwise.generate.branches import branch_of, child_of
from layerwise.generate.choice import Chooser
from layerwise.generate.session import Session
from layerwise.generate.wanted import Wanted, Work


@dataclass(frozen=True)
class Proposal:
    """What a draft hands over.

    tokens:  y_1 … y_g.
    parents: of a tree, the node before each, which comes before it; None for a chain.
    likely:  of a chain, q_0 … q_{g-1}, float64 [g, words], or None for a draft that is certain of its tokens.
    hidden:  of a chain, states of [x_n, y_1 … y_g] behind the first ``depth`` blocks, [1, g + 1, d], whose keys and
             values of these blocks are written; None where verification starts at the first block.
    block_passes: blocks of the network that were run for it.
    read_bytes:   weights that were read for it, as ``Work`` counts them.
    """

    tokens: Sequence[int]
    likely: Tensor | None = None
    hidden: Tensor | None = None
    depth: int = 0
    block_passes: int = 0
    parents: Sequence[int] | None = None
    read_bytes: int = 0

    def child(self, node: int, token: int) -> int | None:
        """The child of a node with this token."""
        if self.parents is not None:
            return child_of(self.tokens, self.parents, node, token)
        return node + 1 if node < len(self.tokens) and self.tokens[node] == token else None


class Draft(Protocol):
    """Proposes tokens. It may run blocks of the session at its length and behind; it must not change the length."""

    def propose(self, session: Session, last: int, count: int, chooser: Chooser) -> Proposal:
        """Tokens that may follow ``last``, which is not in the cache yet, to a depth of at most ``count`` >= 1."""

    def confirmed(self, tokens: Sequence[int], hidden: Tensor) -> None:
        """Told after each round: the tokens that joined, and the last block's states [1, m + 1, d] that chose them."""


class Pace(Protocol):
    """How many tokens to propose."""

    def count(self) -> int:
        """For the next round; 0 for a plain step."""

    def seen(self, drafted: int, accepted: int) -> None:
        """What came of a round."""


@dataclass(frozen=True)
class Steady:
    """The same number of tokens each round."""

    number: int

    def count(self) -> int:
        return self.number

    def seen(self, drafted: int, accepted: int) -> None:
        """Nothing changes its mind."""


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
    block, head = network.read_bytes
    text, over = wanted.cut(network, 0, [first])
    emit(text)
    while not over:
        count = min(pace.count(), wanted.new_tokens - len(text) - 1)  # the round's last token needs no draft
        proposal = draft.propose(session, text[-1], count, chooser) if count > 0 else Proposal(())
        base = session.lengths[0]
        scores, hidden = verify(session, text[-1], proposal)
        said, path = judge(scores, proposal, chooser)
        session.cache.gather(base, [base + node for node in path])
        session.rollback([base + len(path)])
        kept, over = wanted.cut(network, len(text), said)
        text += kept
        emit(kept)
        draft.confirmed(kept, hidden[:, : len(path)] if proposal.parents is None else hidden[:, path])
        pace.seen(len(proposal.tokens), len(path) - 1)
        work.full_passes += 1
        work.block_passes += proposal.block_passes + len(network.blocks) - proposal.depth
        work.read_bytes += proposal.read_bytes + (len(network.blocks) - proposal.depth) * block + head
        work.drafted += len(proposal.tokens)
        work.accepted += len(path) - 1
    return text


def verify(session: Session, last: int, proposal: Proposal) -> tuple[Tensor, Tensor]:
    """The network's scores ``[g + 1, words]`` behind the last token and every proposed one, and its last states.

    Writes keys and values of all blocks at the session's length and behind; the length stays.
    """
    blocks, starts, hidden = len(session.network.blocks), session.lengths, proposal.hidden
    branch = None if proposal.parents is None else branch_of(starts[0], proposal.parents)
    if hidden is None:
        hidden = session.embed(torch.tensor([[last, *proposal.tokens]]), starts, branch)
    hidden = session.run(hidden, range(proposal.depth, blocks), starts, branch)
    return session.scores(hidden)[0], hidden


def judge(scores: Tensor, proposal: Proposal, chooser: Chooser) -> tuple[list[int], list[int]]:
    """(the tokens that join, the nodes that chose them), given every node's scores ``[g + 1, words]``."""
    if proposal.likely is not None and not chooser.choice.greedy:
        kept, token = keep_or_replace(chooser.choice.probabilities(scores), proposal.likely, proposal.tokens, chooser)
        return [*proposal.tokens[:kept], token], list(range(kept + 1))
    best = scores.argmax(-1).tolist() if chooser.choice.greedy else None
    said: list[int] = []
    path: list[int] = []
    node: int | None = 0
    while node is not None:
        path.append(node)
        said.append(chooser.pick(scores[node]) if best is None else best[node])
        node = proposal.child(node, said[-1])
    return said, path


def keep_or_replace(wanted: Tensor, likely: Tensor, tokens: Sequence[int], chooser: Chooser) -> tuple[int, int]:
    """(how many drawn tokens are kept, the token behind them); distributions ``[g + 1, words]`` and ``[g, words]``."""
    for place, token in enumerate(tokens):
        if chooser.uniform() * float(likely[place, token]) < float(wanted[place, token]):
            continue
        rest = (wanted[place] - likely[place]).clamp(min=0)
        # A token is refused only where p < q, so that p > q elsewhere; rounding may leave nothing of it.
        return place, chooser.draw(rest if bool((rest > 0).any()) else wanted[place])
    return len(tokens), chooser.draw(wanted[-1])
