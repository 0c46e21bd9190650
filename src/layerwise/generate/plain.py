"""Plain decoding: a pass of the whole network for every token. What every other generator is held against.

    x_{t+1} = choose(head(norm(blocks(x_1 … x_t)))),   keys and values of x_1 … x_t from the cache

All prompts run side by side as rows of one batch. They are padded behind their ends, and each row keeps its own length,
so that positions, masks and cache are those of the prompt alone; a text that has ended waits for the others.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from layerwise.roles import Generator
from layerwise.technique import technique

if TYPE_CHECKING:
    from layerwise.generate.network import CausalNetwork
    from layerwise.generate.wanted import Emit, Generation, Wanted


@technique(paper="baseline")
class Plain(Generator):
    """Every token by a pass through all blocks."""

    lossless = True

    def generate(
        self, network: CausalNetwork, prompts: Sequence[Sequence[int]], wanted: Wanted, emit: Emit
    ) -> Generation:
        import torch

        from layerwise.generate.wanted import Generation, Work

        work, rows = Work(prefilled=len(prompts)), range(len(prompts))
        block, head = network.read_bytes
        texts: list[list[int]] = [[] for _ in rows]
        done = [False for _ in rows]
        choosers = [wanted.choice.chooser(row) for row in rows]
        with torch.inference_mode():
            began = time.perf_counter()
            session = network.session(len(prompts), max(map(len, prompts)) + wanted.new_tokens, wanted.cache)
            scores = session.scores(session.prefill(prompts))[:, -1]
            work.prefill_seconds = time.perf_counter() - began
            began = time.perf_counter()
            while True:
                best = scores.argmax(-1).tolist() if wanted.choice.greedy else None
                for row in rows:
                    if done[row]:
                        continue
                    token = choosers[row].pick(scores[row]) if best is None else best[row]
                    kept, done[row] = wanted.cut(network, len(texts[row]), [token])
                    texts[row] += kept
                    emit(row, kept)
                if all(done):
                    break
                lengths = session.lengths
                scores = session.full(torch.tensor([[text[-1]] for text in texts]))[:, -1]
                # A text that has ended is fed its last token again and again, always at the same place.
                session.rollback([n + (not over) for n, over in zip(lengths, done, strict=True)])
                work.full_passes += 1
                work.block_passes += len(network.blocks)
                work.read_bytes += len(network.blocks) * block + head
            work.decode_seconds = time.perf_counter() - began
        return Generation(tuple(map(tuple, texts)), work)
