"""Early exit: a token leaves at block E when the head is sure of it there, and goes through all blocks when not.

    p = softmax(head(norm(h_E)));   max p > confidence:  choose from it;   else:  go on through blocks E + 1 … L

A later token that goes on needs keys and values of blocks E + 1 … L for every token before it, those that left
included. So the states h_E of tokens that left wait, and the next token that goes on takes them along through the
remaining blocks in one pass. Keys and values then are those of the network itself: what changes is only which tokens
are chosen, never what the cache holds of them. At most ``waiting`` tokens wait. With ``confidence = 0`` every token
leaves, nothing waits, and blocks E + 1 … L are never run behind the prompt; with 1 none leaves: decoding is plain.

Source: M. Elhoushi et al., "LayerSkip", arXiv 2404.16710, exits at a fixed block through the shared norm and head
(``confidence = 0``). The threshold and the waiting states are ours; most others copy the exit's state upwards instead,
which leaves keys and values behind that no token of the network ever had. Not lossless.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from layerwise.roles import Generator
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.generate.choice import Chooser
    from layerwise.generate.network import CausalNetwork
    from layerwise.generate.session import Session
    from layerwise.generate.wanted import Emit, Generation, Wanted, Work


@technique(
    paper="LayerSkip",
    menu=("confidence=0.9", "confidence=0.5"),
)
class EarlyExit(Generator):
    """Tokens that an early block is sure of leave there."""

    exit: int = option(0, minimum=0, help="blocks before the exit; 0 takes three quarters of them")
    confidence: float = option(0.9, minimum=0.0, maximum=1.0, help="probability that a token must pass to leave")
    waiting: int = option(16, minimum=1, maximum=256, help="tokens that may leave in a row before all blocks run")

    def generate(
        self, network: CausalNetwork, prompts: Sequence[Sequence[int]], wanted: Wanted, emit: Emit
    ) -> Generation:
        import torch

        from layerwise.generate.wanted import Generation, Work

        depth = exit_of(self.exit, len(network.blocks))
        work, texts = Work(prefilled=len(prompts)), []
        for row, prompt in enumerate(prompts):
            chooser = wanted.choice.chooser(row)
            with torch.inference_mode():
                began = time.perf_counter()
                session = network.session(1, len(prompt) + wanted.new_tokens, wanted.cache)
                scores = session.scores(session.prefill([prompt]))[0, -1]
                work.prefill_seconds += time.perf_counter() - began
                began = time.perf_counter()
                text, over = wanted.cut(network, 0, [chooser.pick(scores)])
                emit(row, text)
                waiting: list[Tensor] = []
                while not over:
                    token = self._next(session, text[-1], depth, waiting, chooser, work)
                    kept, over = wanted.cut(network, len(text), [token])
                    text += kept
                    emit(row, kept)
                work.decode_seconds += time.perf_counter() - began
            texts.append(tuple(text))
        return Generation(tuple(texts), work, {"exit": depth})

    def _next(
        self, session: Session, last: int, depth: int, waiting: list[Tensor], chooser: Chooser, work: Work
    ) -> int:
        """Choose the token behind ``last``; the states of tokens that left are in ``waiting``, newest at the end."""
        import torch

        place, blocks = session.lengths[0], len(session.network.blocks)
        hidden = session.run(session.embed(torch.tensor([[last]]), [place]), range(depth), [place])
        session.rollback([place + 1])
        work.block_passes += depth
        if self.confidence == 0 or len(waiting) < self.waiting:
            scores = session.scores(hidden)[0, -1]
            if self.confidence == 0 or float(scores.float().softmax(-1).amax()) > self.confidence:
                waiting += [hidden] if self.confidence > 0 else []
                work.exited += 1
                return chooser.pick(scores)
        together = torch.cat([*waiting, hidden], 1)
        out = session.run(together, range(depth, blocks), [place - len(waiting)])
        waiting.clear()
        work.full_passes += 1
        work.block_passes += blocks - depth
        return chooser.pick(session.scores(out[:, -1:])[0, -1])


def exit_of(asked: int, blocks: int) -> int:
    """Blocks before the exit. Raises ``InputError`` where that is all of them."""
    from layerwise.errors import InputError

    if blocks < 2 or asked >= blocks:
        raise InputError(f"an exit lies before the last of the network's {blocks} blocks, not behind block {asked}")
    return asked or max(1, 3 * blocks // 4)
