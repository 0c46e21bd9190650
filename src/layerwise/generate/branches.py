"""Trees of guesses: several continuations are confirmed by one pass, and the cache keeps the one that is true.

A round begins with x_1 … x_n known and keys and values of x_1 … x_{n-1} in the cache. Guesses are the nodes of a tree:

    node 0 = x_n ─┬─ node 1 ─┬─ node 3 …        depth of a node = its distance to node 0
                  └─ node 2  └─ node 4 …        position of a node = n - 1 + its depth

All nodes lie in the cache one behind the other, in the order in which they were made; a node sees x_1 … x_{n-1}, its
ancestors and itself, so that its scores are those of its path alone. Then tokens are chosen from node 0 on: where the
chosen token is a child, the walk goes on there, else the round is over. The chosen tokens join the text; their keys
and values are moved together, for a path has gaps, and the rest is forgotten. A chain is a tree without branches.

Tokens are chosen by the text's own chooser from the network's own scores, never by the guesses, one random number a
token. So greedy texts are those of plain decoding, and so are drawn ones, token for token with the same seed; guesses
only decide how many passes it takes. A drawn token is found among k children with probability sum of p over them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from layerwise.generate.choice import Chooser
from layerwise.generate.session import Branch, Session
from layerwise.generate.wanted import Wanted, Work


@dataclass(frozen=True)
class Guesses:
    """Tokens of nodes 1, 2, … and the node before each, which comes before it; node 0 is the last known token."""

    tokens: Sequence[int]
    parents: Sequence[int]

    @property
    def chain(self) -> bool:
        return list(self.parents) == list(range(len(self.parents)))

    def child(self, node: int, token: int) -> int | None:
        """The child of a node with this token."""
        pairs = enumerate(zip(self.tokens, self.parents, strict=True), start=1)
        return next((i for i, found in pairs if found == (token, node)), None)


def branch_of(base: int, parents: Sequence[int]) -> Branch:
    """All nodes of a tree behind ``base`` positions; ``parents`` as in ``Guesses``."""
    count = len(parents) + 1
    depths, sees = [0] * count, torch.eye(count, dtype=torch.bool)
    for node, parent in enumerate(parents, start=1):
        depths[node] = depths[parent] + 1
        sees[node] |= sees[parent]
    return Branch(base, torch.tensor(depths), sees)


class Guesser(Protocol):
    """Makes guesses. It may keep a cache of its own; the session's is not its to change."""

    def guess(self, last: int, depth: int) -> Guesses:
        """A tree of at most ``depth`` >= 1 tokens behind ``last``."""

    def confirmed(self, tokens: Sequence[int], hidden: Tensor) -> None:
        """Told after each round: the tokens that joined, and the last block's states [1, count, d] that chose them."""


@torch.inference_mode()
def decode(
    session: Session,
    first: int,
    guesser: Guesser,
    depth: int,
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
        room = min(depth, wanted.new_tokens - len(text) - 1)  # the round's last token needs no guess
        guesses = guesser.guess(text[-1], room) if room > 0 else Guesses((), ())
        base = session.lengths[0]
        hidden = confirm(session, text[-1], guesses)
        said, path = walk(session.scores(hidden)[0], guesses, chooser)
        session.cache.gather(base, [base + node for node in path])
        session.rollback([base + len(path)])
        kept, over = wanted.cut(network, len(text), said)
        text += kept
        emit(kept)
        guesser.confirmed(kept, hidden[:, path])
        work.full_passes += 1
        work.block_passes += len(network.blocks)
        work.drafted += len(guesses.tokens)
        work.accepted += len(path) - 1
    return text


def confirm(session: Session, last: int, guesses: Guesses) -> Tensor:
    """The last block's states ``[1, nodes, d]`` of the last token and every guess; the session's length stays."""
    starts = session.lengths
    branch = None if guesses.chain else branch_of(starts[0], guesses.parents)
    hidden = session.embed(torch.tensor([[last, *guesses.tokens]]), starts, branch)
    return session.run(hidden, range(len(session.network.blocks)), starts, branch)


def walk(scores: Tensor, guesses: Guesses, chooser: Chooser) -> tuple[list[int], list[int]]:
    """(the tokens that join, the nodes that chose them), given every node's scores ``[nodes, words]``."""
    best = scores.argmax(-1).tolist() if chooser.choice.greedy else None
    said: list[int] = []
    path: list[int] = []
    node: int | None = 0
    while node is not None:
        path.append(node)
        said.append(chooser.pick(scores[node]) if best is None else best[node])
        node = guesses.child(node, said[-1])
    return said, path
