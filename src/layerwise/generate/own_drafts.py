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
from layerwise.generate.confidence import FORGET, Confidence, sureness
from layerwise.generate.network import CausalNetwork
from layerwise.generate.session import Session
from layerwise.generate.speculation import Proposal

MEASURED = 48  # last tokens of the prompt at which drafts are tried
PRIOR_WEIGHT = 16.0  # rounds' worth that the agreement on the prompt counts for, at most
ROUNDS = 5  # over which acceptance must not be below the floor
SKIPPED_SHARES = (0.25, 0.5)


@dataclass
class OwnDraft:
    """Drafts by a run of the network's own blocks; those that end at an exit may end where they are not sure."""

    blocks: Sequence[int]
    depth: int
    confidence: Confidence | None = None

    def propose(self, session: Session, last: int, count: int, chooser: Chooser) -> Proposal:
        start, confidence = session.lengths[0], self.confidence
        tokens: list[int] = []
        likely: list[Tensor] = []
        states: list[Tensor] = []
        looked = 0  # how often the head was read
        if confidence is not None:
            confidence.begin()
        while self.depth or len(tokens) < count:  # verification feeds the last token itself, except behind an exit
            places = [start + len(tokens)]
            hidden = session.embed(torch.tensor([[tokens[-1] if tokens else last]]), places)
            hidden = session.run(hidden, self.blocks, places)
            states.append(hidden)
            if len(tokens) == count:
                break
            scores, looked = session.scores(hidden)[0, -1], looked + 1
            if confidence is not None:
                sure = sureness(scores)
                if not confidence.pays(sure):
                    break
                confidence.took(sure)
            if chooser.choice.greedy:
                tokens.append(int(scores.argmax(-1)))
            else:
                likely.append(chooser.choice.probabilities(scores))
                tokens.append(chooser.draw(likely[-1]))
        passes, (block, head) = len(states) * len(self.blocks), session.network.read_bytes
        return Proposal(
            tokens,
            torch.stack(likely) if likely else None,
            torch.cat(states, 1) if self.depth else None,
            self.depth,
            passes,
            read_bytes=passes * block + looked * head,
        )

    def confirmed(self, tokens: Sequence[int], hidden: Tensor) -> None:
        """Its keys and values are the network's own, so there is nothing to keep but how sure it may be."""
        if self.confidence is not None:
            self.confidence.told(hidden.shape[1] - 1)


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

    @property
    def price(self) -> float:
        """One more drafted token, in plain tokens."""
        return (self.drafting * self.block + self.head) / self.plain

    def gain_of(self, drafted: float, accepted: float) -> float:
        """Tokens for the bytes of one plain token, if an exit drafts and has accepted these shares of all tokens."""
        looked = (1 - drafted) * self.head / self.plain
        return 1 / max(1 - accepted + drafted * self.price + looked, self.price)

    def gain(self, agreement: float, count: int) -> float:
        """Tokens for the bytes of one plain token."""
        tokens = count + 1.0 if agreement >= 1 else (1 - agreement ** (count + 1)) / (1 - agreement)
        return tokens * self.plain / self.round(count)

    def best(self, agreement: float, most: int) -> int:
        """The number of drafts with the largest gain; 0 where none pays."""
        return max(range(most + 1), key=lambda count: (self.gain(agreement, count), -count))


@dataclass(frozen=True)
class Plan:
    """Which blocks draft, what it costs, and the share of tokens at which they agreed with the network.

    sure: of an exit whose drafts end where it is not sure, the mean of its largest probabilities; None otherwise.
    gain: tokens for the bytes of one plain token, as expected.
    """

    blocks: tuple[int, ...]
    depth: int
    cost: Cost
    agreement: float
    measured: int
    gain: float
    sure: float | None = None

    def drafting(self, tokens: int, most: int, floor: float) -> tuple[OwnDraft, Following]:
        """The draft, and its pace."""
        weight = min(PRIOR_WEIGHT, self.measured) + 1.0
        confidence = None
        if self.sure is not None:
            confidence = Confidence(self.cost.price, self.agreement * weight, self.sure * weight)
        pace = Following(self.cost, tokens, most, floor, self.agreement * weight, weight, confidence)
        return OwnDraft(self.blocks, self.depth, confidence), pace

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
    confidence: Confidence | None = None  # ends a draft by itself
    recent: list[tuple[int, int]] = field(default_factory=list)
    stopped: bool = False

    def count(self) -> int:
        if self.stopped:
            return 0
        if self.confidence is not None:
            return self.most if self.confidence.possible else 0
        return self.fixed or self.cost.best(self.agreed / self.tried, self.most)

    def seen(self, drafted: int, accepted: int) -> None:
        if not drafted or self.confidence is not None:
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
    tokens: int = 0,
) -> Plan:
    """The plan whose drafts gain most by their agreement on the prompt; ``seen`` as ``Session.prefill`` fills it.

    tokens: of every draft; 0 lets exits end their drafts by how sure they are, and chooses a number for others.
    """
    network = session.network
    tail = slice(-min(MEASURED, len(prompt)), None)
    wanted = network.scores(seen[-1][0, tail])
    if fixed is not None:
        choices = [fixed]
    else:
        count = len(network.blocks)
        choices = [] if draft == "skip" else [(tuple(range(depth)), depth) for depth in range(1, count)]
        choices += [] if draft == "exit" else [(kept, 0) for kept in skipping(seen, tail)]
    block, head = network.read_bytes
    plans: list[Plan] = []
    for blocks, depth in choices:
        hidden = seen[depth - 1] if depth else run_again(session, prompt, blocks)
        offered = network.scores(hidden[0, tail])
        shares = agreement(wanted, offered, choice)
        cost = Cost(block, head, len(network.blocks), len(blocks), depth)
        # One agreement and one refusal beside what was seen: a short prompt proves little.
        agreed, measured = (sum(shares) + 1) / (len(shares) + 2), len(shares)
        if depth and not tokens:
            sure = offered.float().softmax(-1).amax(-1)
            mean = (float(sure.sum()) + 1) / (measured + 2)
            drafts = [float(p) * agreed / mean >= cost.price for p in sure]
            accepted = sum(share for share, drawn in zip(shares, drafts, strict=True) if drawn)
            gain = cost.gain_of(sum(drafts) / (measured + 2), accepted / (measured + 2))
            plans.append(Plan(blocks, depth, cost, agreed, measured, gain, mean))
        else:
            gain = cost.gain(agreed, tokens or cost.best(agreed, most))
            plans.append(Plan(blocks, depth, cost, agreed, measured, gain))
    return max(plans, key=lambda p: (p.gain, p.agreement))


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
