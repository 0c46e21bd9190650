"""Drafts that a network makes with some of its own blocks, and the choice among them.

A draft is described by the blocks that it runs, and by how many of them, from the first on, verification need not run
again (``depth``; 0 where blocks in between were skipped, since then later states are not those of the network).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from layerwise.errors import InputError
from layerwise.generate.choice import Choice, Chooser
from layerwise.generate.network import CausalNetwork
from layerwise.generate.session import Session
from layerwise.generate.speculation import Proposal

MEASURED = 48  # last tokens of the prompt at which drafts are tried
PRIOR_WEIGHT = 16.0  # rounds' worth that the agreement on the prompt counts for, at most
FORGET = 0.95  # of what was seen, from round to round
ROUNDS = 5  # over which acceptance must not be below the floor
SKIPPED_SHARES = (0.25, 0.5)


@dataclass
class OwnDraft:
    """Drafts by a run of the network's own blocks."""

    blocks: Sequence[int]
    depth: int

    def propose(self, session: Session, last: int, count: int, chooser: Chooser) -> Proposal:
        start = session.lengths[0]
        tokens: list[int] = []
        likely: list[Tensor] = []
        states: list[Tensor] = []
        while True:
            token = tokens[-1] if tokens else last
            if len(tokens) == count and not self.depth:
                break  # verification feeds the last token itself
            places = [start + len(tokens)]
            hidden = session.run(session.embed(torch.tensor([[token]]), places), self.blocks, places)
            states.append(hidden)
            if len(tokens) == count:
                break
            scores = session.scores(hidden)[0, -1]
            if chooser.choice.greedy:
                tokens.append(int(scores.argmax(-1)))
            else:
                likely.append(chooser.choice.probabilities(scores))
                tokens.append(chooser.draw(likely[-1]))
        return Proposal(
            tokens,
            torch.stack(likely) if likely else None,
            torch.cat(states, 1) if self.depth else None,
            self.depth,
            len(states) * len(self.blocks),
        )

    def confirmed(self, tokens: Sequence[int], hidden: Tensor) -> None:
        """Its keys and values are the network's own, so there is nothing to keep."""


@dataclass(frozen=True)
class Cost:
    """Bytes read by a plain token, by a drafted one, and by one round of ``count`` drafts."""

    block: int
    head: int
    blocks: int  # of the network
    drafting: int  # of the draft
    depth: int

    @property
    def plain(self) -> int:
        return self.blocks * self.block + self.head

    def round(self, count: int) -> int:
        if not count:
            return self.plain
        fed = count + 1 if self.depth else count
        verified = (self.blocks - self.depth) * self.block + self.head
        return fed * self.drafting * self.block + count * self.head + verified

    def gain(self, agreement: float, count: int) -> float:
        """Tokens for the bytes of one plain token."""
        tokens = count + 1.0 if agreement >= 1 else (1 - agreement ** (count + 1)) / (1 - agreement)
        return tokens * self.plain / self.round(count)

    def best(self, agreement: float, most: int) -> int:
        """The number of drafts with the largest gain; 0 where none pays."""
        return max(range(most + 1), key=lambda count: (self.gain(agreement, count), -count))


@dataclass(frozen=True)
class Plan:
    """Which blocks draft, what it costs, and the share of tokens at which they agreed with the network."""

    blocks: tuple[int, ...]
    depth: int
    cost: Cost
    agreement: float
    measured: int

    def draft(self) -> OwnDraft:
        return OwnDraft(self.blocks, self.depth)

    def pace(self, tokens: int, most: int, floor: float) -> Following:
        weight = min(PRIOR_WEIGHT, self.measured)
        return Following(self.cost, tokens, most, floor, self.agreement * weight + 0.5, weight + 1)

    def __str__(self) -> str:
        out = sorted(set(range(self.cost.blocks)) - set(self.blocks))
        by = f"exit {self.depth}" if self.depth else f"skip {'/'.join(map(str, out))}"
        return f"{by} of {self.cost.blocks}, agreement {self.agreement:.2f} on {self.measured} tokens"


@dataclass
class Following:
    """The pace that follows the agreement seen so far."""

    cost: Cost
    fixed: int
    most: int
    floor: float
    agreed: float
    tried: float
    recent: list[tuple[int, int]] = field(default_factory=list)
    stopped: bool = False

    def count(self) -> int:
        if self.stopped:
            return 0
        return self.fixed or self.cost.best(self.agreed / self.tried, self.most)

    def seen(self, drafted: int, accepted: int) -> None:
        if not drafted:
            return
        # A draft ends at its first refusal: the tokens behind it say nothing.
        self.agreed = FORGET * self.agreed + accepted
        self.tried = FORGET * self.tried + accepted + (accepted < drafted)
        self.recent = [*self.recent, (drafted, accepted)][-ROUNDS:]
        total = sum(d for d, _ in self.recent)
        self.stopped = len(self.recent) == ROUNDS and sum(a for _, a in self.recent) < self.floor * total


# ---------------------------------------------------------------- choosing


def fixed_plan(network: CausalNetwork, draft: str, depth: int, skip: str) -> tuple[tuple[int, ...], int] | None:
    """(blocks, depth) that options name, or None. Raises ``InputError`` for blocks that the network does not have."""
    count = len(network.blocks)
    if count < 2:
        raise InputError("self-speculative decoding drafts with some of the blocks, and this network has only one")
    if depth and skip != "auto":
        raise InputError("give exit or skip, not both: drafting stops at a block, or leaves some out")
    if depth:
        if draft == "skip":
            raise InputError("draft=skip has no exit; leave exit out or write draft=exit")
        if depth >= count:
            raise InputError(f"exit={depth} leaves nothing to verify with; the network has {count} blocks")
        return tuple(range(depth)), depth
    if skip != "auto":
        if draft == "exit":
            raise InputError("draft=exit skips no blocks; leave skip out or write draft=skip")
        out = read_blocks(skip, count)
        return tuple(i for i in range(count) if i not in out), 0
    return None


def read_blocks(text: str, count: int) -> set[int]:
    """``3-5/7`` -> {3, 4, 5, 7}; blocks count from 0."""
    found: set[int] = set()
    for part in text.split("/"):
        first, _, last = part.partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise InputError(f"skip names blocks such as 3-5 or 2/4, not {text!r}")
        found |= set(range(int(first), int(last or first) + 1))
    if not found or max(found) >= count or len(found) >= count:
        raise InputError(f"skip={text} does not leave some of the network's {count} blocks, which count from 0")
    return found


def choose_plan(
    session: Session,
    prompt: Sequence[int],
    seen: Sequence[Tensor],
    choice: Choice,
    fixed: tuple[tuple[int, ...], int] | None,
    draft: str,
    most: int,
) -> Plan:
    """The plan whose drafts gain most by their agreement on the prompt; ``seen`` as ``Session.prefill`` fills it."""
    network = session.network
    tail = slice(-min(MEASURED, len(prompt)), None)
    wanted = network.scores(seen[-1][0, tail])
    if fixed is not None:
        choices = [fixed]
    else:
        count = len(network.blocks)
        choices = [] if draft == "skip" else [(tuple(range(depth)), depth) for depth in range(1, count)]
        choices += [] if draft == "exit" else [(kept, 0) for kept in skipping(seen, tail)]
    block, head = network.read_bytes()
    plans: list[Plan] = []
    for blocks, depth in choices:
        hidden = seen[depth - 1] if depth else run_again(session, prompt, blocks)
        shares = agreement(wanted, network.scores(hidden[0, tail]), choice)
        cost = Cost(block, head, len(network.blocks), len(blocks), depth)
        # One agreement and one refusal beside what was seen: a short prompt proves little.
        plans.append(Plan(blocks, depth, cost, (sum(shares) + 1) / (len(shares) + 2), len(shares)))
    return max(plans, key=lambda p: (p.cost.gain(p.agreement, p.cost.best(p.agreement, most)), p.agreement))


def agreement(wanted: Tensor, offered: Tensor, choice: Choice) -> list[float]:
    """How likely a drafted token is kept, at each of ``[tokens, words]`` scores."""
    if choice.greedy:
        return [float(same) for same in (wanted.argmax(-1) == offered.argmax(-1)).tolist()]
    return [float(x) for x in torch.minimum(choice.probabilities(wanted), choice.probabilities(offered)).sum(-1)]


def skipping(seen: Sequence[Tensor], tail: slice) -> list[tuple[int, ...]]:
    """Blocks that remain without those that turn the states least, never the first or the last."""
    count = len(seen)
    turned = [
        1 - float(cosine_similarity(seen[i - 1][0, tail], seen[i][0, tail], dim=-1).mean()) for i in range(1, count)
    ]
    order = sorted(range(1, count - 1), key=lambda i: (turned[i - 1], i))
    sizes = dict.fromkeys(min(len(order), max(1, round(share * count))) for share in SKIPPED_SHARES)
    return [tuple(i for i in range(count) if i not in order[:size]) for size in sizes if size]


def run_again(session: Session, prompt: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """States of the prompt behind some blocks, in a cache of its own."""
    other = session.network.session(1, len(prompt), session.cache.kind)
    starts = [0]
    return other.run(other.embed(torch.tensor([list(prompt)]), starts), blocks, starts)
