"""EAGLE: a head of one block guesses the network's next features, and so its next tokens; the network confirms them.

    g_{i+1} = block(W [e(t_{i+1}) ; f_i])        f = what the network's own head reads, t = tokens, e = its table
    t_{i+2} ~ head(g_{i+1})                      then (t_{i+2}, g_{i+1}) is what the head is fed next

Features are easier to guess than tokens, but which feature comes next hangs on which token was chosen, and the network
does not say that: so the head is told the token one step ahead (``draft_head.py``). It learns from text with the
network frozen, and is a file of its own (``layerwise fit eagle MODEL HEAD --text TEXT``).

A round: the head is fed the true features of all tokens that are known, then its own guesses, level by level; the
``width`` likeliest paths of each level are grown on, while the truth is likely enough to be among them for that to pay
(``confidence.py``), or ``tokens`` levels. All are confirmed by one pass (``speculation.py``). Before the next
round the head's cache goes back to what came of true features, also for guesses that were right: keys made of guessed
features would not change a token, but make later guesses worse.

Source: Y. Li et al., "EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty", arXiv 2401.15077. Its tree
has one shape for all texts; ours keeps the likeliest paths by the head's own probabilities. The paper draws guesses and
accepts them by a test that keeps the distribution; here guesses are the likeliest tokens and the network's own draw
walks the tree, which keeps not just the distribution but plain decoding's very draws.

Measured on docs-lm (5 blocks of width 192) with heads of 150 steps: 0.59 full passes a token as a chain, 0.46 as three
paths, in 1.13 and 1.15 times the time of plain decoding; a chain of 4 every round takes 0.52 passes and 1.32 times the
time. Of its guesses 24 % are right, 9 to 12 % where the head is fed the token too late, only the feature or only the
token. On stories5m, with a head of 400 steps, a chain takes 0.40 passes and is 1.34 times as fast as plain decoding. A
guess runs the network's head and a block, which of five small blocks is a third of a token; deeper networks save more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.roles import Generator
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.engine.progress import Progress
    from layerwise.generate.choice import Chooser
    from layerwise.generate.confidence import Confidence
    from layerwise.generate.draft_head import DraftHead
    from layerwise.generate.network import CausalNetwork
    from layerwise.generate.session import Session
    from layerwise.generate.speculation import Proposal
    from layerwise.generate.wanted import Emit, Generation, Wanted


PRIOR = 4.0  # tokens' worth that the head's own word counts for before any was tried


@technique(
    paper="EAGLE",
    menu=("width=1", "width=3"),
    left_out="guesses that are drawn rather than the likeliest, and training on text that the network itself wrote",
)
class Eagle(Generator):
    """A trained head guesses features, all blocks confirm the tokens: plain decoding's tokens in fewer passes."""

    lossless = True
    learns = True
    head: str = option("", help="folder of the draft head, made by layerwise fit eagle")
    tokens: int = option(0, minimum=0, maximum=16, help="how far guesses reach; 0 goes on while the head is sure")
    most: int = option(8, minimum=1, maximum=16, help="how far they reach at most, when the head decides")
    width: int = option(1, minimum=1, maximum=8, help="paths that are followed; 1 is a chain")
    inputs: str = option(
        "shifted", choices=("shifted", "unshifted", "feature", "token"), help="what a head to be trained is fed"
    )
    steps: int = option(400, minimum=1, help="of training a head")
    batch: int = option(8, minimum=1, help="windows a step of training")
    length: int = option(128, minimum=3, help="tokens of a window of training")
    rate: float = option(5e-3, minimum=1e-6, maximum=1.0, help="peak rate of training")

    def learn(self, network: CausalNetwork, tokens: Tensor, folder: Path, seed: int, progress: Progress) -> Eagle:
        from layerwise.generate.draft_head import DraftHead, save_head, train_head

        head = DraftHead(network, self.inputs, seed)
        length = min(self.length, network.longest)
        with progress.stage(f"train a head on {self.inputs} inputs", self.steps) as advance:
            train_head(network, head, tokens, self.steps, self.batch, length, self.rate, seed, advance)
        save_head(head, folder)
        found: Any = replace(  # type: ignore[type-var]
            Eagle(), head=str(folder), tokens=self.tokens, most=self.most, width=self.width
        )
        assert isinstance(found, Eagle)
        return found

    def generate(
        self, network: CausalNetwork, prompts: Sequence[Sequence[int]], wanted: Wanted, emit: Emit
    ) -> Generation:
        import torch

        from layerwise.errors import InputError
        from layerwise.generate.confidence import Confidence
        from layerwise.generate.draft_head import load_head
        from layerwise.generate.speculation import Steady, speculate
        from layerwise.generate.wanted import Generation, Work

        if not self.head:
            raise InputError(
                "eagle needs a draft head, written eagle:head=DIR; make one with: "
                "layerwise fit eagle MODEL DIR --text TEXT"
            )
        head = load_head(network, Path(self.head))
        work, texts, reach = Work(prefilled=len(prompts)), [], self.tokens or self.most
        for row, prompt in enumerate(prompts):
            chooser = wanted.choice.chooser(row)
            with torch.inference_mode():
                began = time.perf_counter()
                capacity = len(prompt) + wanted.new_tokens
                session = network.session(1, capacity, wanted.cache, self.width * reach)
                seen: list[torch.Tensor] = []
                scores = session.scores(session.prefill([prompt], seen))[0, -1]
                first = chooser.pick(scores)
                draft = Levels(network, head, self.width, prompt, session)
                if not self.tokens:
                    draft.confidence = Confidence(draft.price, PRIOR, PRIOR)
                draft.confirmed([*prompt[1:], first], seen[-1])
                del seen
                work.prefill_seconds += time.perf_counter() - began
                began = time.perf_counter()
                text = speculate(
                    session, first, draft, Steady(reach), chooser, wanted, work,
                    lambda tokens, row=row: emit(row, tokens),  # type: ignore[misc]
                )  # fmt: skip
                work.decode_seconds += time.perf_counter() - began
            texts.append(tuple(text))
        return Generation(tuple(texts), work)


class Levels:
    """The head's guesses behind one text, level by level.

    Its cache holds an entry for each pair (feature of a token, the token behind it) that is known; guesses lie behind
    them and are written over. ``pending`` are pairs that are known and not yet fed.
    """

    def __init__(
        self, network: CausalNetwork, head: DraftHead, width: int, prompt: Sequence[int], session: Session
    ) -> None:
        from layerwise.generate.draft_head import as_network

        self.network, self.head, self.width, self.newest = network, head, width, prompt[0]
        self.confidence: Confidence | None = None
        block, words = network.read_bytes
        self.read_bytes = sum(p.nbytes for p in head.parameters()) + words  # of a level of guesses
        self.price = self.read_bytes / (len(network.blocks) * block + words)
        spare = session.cache.capacity - session.capacity
        self.session = as_network(network, head).session(1, session.capacity, session.cache.kind, spare)
        self.pending: list[tuple[list[int], Tensor]] = []

    def confirmed(self, tokens: Sequence[int], hidden: Tensor) -> None:
        """``tokens`` were chosen behind the positions of ``hidden`` [1, count, d], the last block's states."""
        kept = hidden[:, : len(tokens)]
        beside = list(tokens) if self.head.inputs != "unshifted" else [self.newest, *tokens[:-1]]
        self.pending.append((beside, self.network.norm(kept)))
        self.newest = tokens[-1]
        if self.confidence is not None:
            self.confidence.told(hidden.shape[1] - 1)

    def propose(self, session: Session, last: int, count: int, chooser: Chooser) -> Proposal:
        """The tree that grows from the ``width`` likeliest paths of each level; a chain where that is one."""
        if self.confidence is not None:
            self.confidence.begin()
        base = self._feed_known()
        return self._chain(last, count, base) if self.width == 1 else self._tree(last, count, base)

    def _chain(self, last: int, count: int, base: int) -> Proposal:
        from layerwise.generate.confidence import sureness
        from layerwise.generate.speculation import Proposal

        tokens: list[int] = []
        feature = self.feature
        while True:
            scores = self.network.head(feature)[0, -1]
            sure = sureness(scores) if self.confidence is not None else 1.0
            tokens.append(int(scores.argmax(-1)))
            if len(tokens) == count or not self._pays(sure):
                return Proposal(tokens, read_bytes=len(tokens) * self.read_bytes)
            said = tokens[-1] if self.head.inputs != "unshifted" else [last, *tokens][-2]
            mixed = self.head.mixed(self._embedded([said]), feature)
            feature = self.session.run(mixed, (0,), [base + len(tokens) - 1])

    def _tree(self, last: int, depth: int, base: int) -> Proposal:
        import torch

        from layerwise.generate.branches import branch_of
        from layerwise.generate.speculation import Proposal

        tokens: list[int] = []
        parents: list[int] = []
        features, scores = self.feature, self.network.head(self.feature)[0].float().log_softmax(-1)
        level, sums = [0], torch.zeros(1)  # nodes that are grown, and log-probabilities of their paths
        before = 0.0  # the log-probability that the truth was on the level above
        for reached in range(1, depth + 1):
            best, words = scores.topk(min(self.width, scores.shape[-1]), dim=-1)
            all_sums = (sums[:, None].to(best) + best).flatten()
            sums, chosen = all_sums.topk(min(self.width, len(all_sums)))
            origin = (chosen // best.shape[1]).tolist()
            made = words.flatten()[chosen].tolist()
            first = len(tokens) + 1
            tokens += made
            parents += [level[place] for place in origin]
            above, level = level, list(range(first, first + len(made)))
            if reached == depth:
                break
            if self.confidence is not None:
                now = float(sums.logsumexp(0))
                if not self._pays(math.exp(min(0.0, now - before))):
                    break
                before = now
            said = made if self.head.inputs != "unshifted" else [([last, *tokens])[above[p]] for p in origin]
            # The head's own tree has no node 0: a guess of the first level stands where the known pairs end.
            own = branch_of(base - 1, parents)
            mixed = self.head.mixed(self._embedded(said), features[:, origin])
            branch = replace(own, base=base, depths=own.depths[1:] - 1, sees=own.sees[first:, 1:])
            features = self.session.run(mixed, (0,), [base], branch)
            scores = self.network.head(features)[0].float().log_softmax(-1)
        return Proposal(tokens, parents=parents, read_bytes=reached * self.read_bytes)

    def _pays(self, sure: float) -> bool:
        """Whether guesses behind those that were just made pay; these are made, and cost next to nothing more."""
        if self.confidence is None:
            return True
        self.confidence.took(sure)
        return self.confidence.pays()

    def _feed_known(self) -> int:
        """Feed what is known; ``feature`` is the guess behind it. Returns how many pairs the cache holds."""
        import torch

        words = [word for found, _ in self.pending for word in found]
        start = self.session.lengths[0]
        mixed = self.head.mixed(self._embedded(words), torch.cat([f for _, f in self.pending], 1))
        self.feature: Any = self.session.run(mixed, (0,), [start])[:, -1:]
        self.session.lengths = [start + len(words)]
        self.pending = []
        return start + len(words)

    def _embedded(self, words: Sequence[int]) -> Tensor:
        import torch

        embedded: Tensor = self.network.table(torch.tensor([list(words)], device=self.network.device))
        return embedded
