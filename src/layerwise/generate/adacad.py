"""AdaCAD: what the context changes is said louder, by as much as context and network disagree about the next token.

    z_c = scores behind (context, question, answer so far)      z_0 = scores behind (question, answer so far)
    p = softmax z_c,  q = softmax z_0,  m = (p + q) / 2
    a = (KL(p || m) + KL(q || m)) / 2                the Jensen-Shannon divergence, in nats: 0 … ln 2
    z = (1 + a) z_c - a z_0                          that is, p (p / q)^a up to a factor

Where both agree, a = 0 and nothing is changed; a fixed ``alpha`` (``adapt=false``) is context-aware decoding, which
distorts there. The two texts run as two rows of one session, and every chosen token joins both. Without a context the
question is the whole prompt, a is 0 at every token, and decoding is plain. ``floor`` keeps a from below: long answers
begin where the two hardly differ, and the paper takes 0.3 for summaries.

Source: H. Wang et al., "AdaCAD: Adaptively Decoding to Balance Conflicts between Contextual and Parametric Knowledge",
arXiv 2409.07394. Its text gives the divergence in base 2, its code in nats; ``base`` is ours to choose, nats by
default. What p and q hold below 1e-9 does not count.

Measured on docs-lm, on questions of its own texts: the fixed contrast of 1 follows the context in 10 points more of
the conflicts than plain decoding, but spoils 5.5 points of the agreements and 3.5 of real text; the adaptive one gains
1 point and loses 1 and none. So it does no harm, as the paper says, but keeps little of the gain: so small a network is
unsure of its own memory, the two distributions diverge little, and the mean strength is 0.05.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from layerwise.roles import Generator
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.generate.network import CausalNetwork
    from layerwise.generate.wanted import Emit, Generation, Wanted

LEAST = 1e-9  # probability that still counts


@technique(
    paper="AdaCAD",
    menu=("adapt=true", "adapt=false,alpha=0.5", "adapt=false,alpha=1.0"),
    left_out="the paper's question and summary sets, and its networks of billions of parameters",
)
class Adacad(Generator):
    """Scores with the context against scores without it, contrasted as far as the two diverge."""

    judged_by = "context"
    adapt: bool = option(True, help="contrast by the divergence, not by alpha")
    alpha: float = option(0.5, minimum=0.0, maximum=10.0, help="strength of the contrast where it is not adapted")
    floor: float = option(0.0, minimum=0.0, maximum=1.0, help="strength at least, where it is adapted")
    base: str = option("e", choices=("e", "2"), help="of the logarithm: strength up to ln 2, or up to 1")

    def generate(
        self, network: CausalNetwork, prompts: Sequence[Sequence[int]], wanted: Wanted, emit: Emit
    ) -> Generation:
        import torch

        from layerwise.generate.wanted import Generation, Work

        work, texts, strengths = Work(prefilled=len(prompts)), [], []
        for row, prompt in enumerate(prompts):
            chooser, given = wanted.choice.chooser(row), [prompt]
            bare = wanted.bare[row] if wanted.bare else prompt
            if list(bare) != list(prompt):
                given.append(bare)
            used: list[float] = []
            with torch.inference_mode():
                began = time.perf_counter()
                session = network.session(len(given), max(map(len, given)) + wanted.new_tokens, wanted.cache)
                scores = session.scores(session.prefill(given))[:, -1]
                work.prefill_seconds += time.perf_counter() - began
                began = time.perf_counter()
                text: list[int] = []
                over = False
                while True:
                    changed, strength = self.contrast(scores[0], scores[-1]) if len(given) > 1 else (scores[0], 0.0)
                    used.append(strength)
                    kept, over = wanted.cut(network, len(text), [chooser.pick(changed)])
                    text += kept
                    emit(row, kept)
                    if over:
                        break
                    scores = session.full(torch.tensor([text[-1:]] * len(given)))[:, -1]
                    work.full_passes += len(given)
                    work.block_passes += len(given) * len(network.blocks)
                work.decode_seconds += time.perf_counter() - began
            texts.append(tuple(text))
            strengths.append(round(sum(used) / len(used), 4))
        return Generation(tuple(texts), work, {"mean_strength": strengths})

    def contrast(self, with_context: Tensor, without: Tensor) -> tuple[Tensor, float]:
        """(contrasted scores [words], strength) from both scores [words]."""
        strength = max(self.floor, divergence(with_context, without, self.base)) if self.adapt else self.alpha
        if strength == 0:
            return with_context, 0.0
        return (1 + strength) * with_context - strength * without, strength


def divergence(one: Tensor, other: Tensor, base: str = "e") -> float:
    """Jensen-Shannon divergence of the distributions that two vectors of scores [words] stand for."""
    p, q = one.double().softmax(-1), other.double().softmax(-1)
    logs = [x.clamp(min=LEAST).log() for x in (p, q, (p + q) / 2)]
    found = float((p * (logs[0] - logs[2])).sum() + (q * (logs[1] - logs[2])).sum()) / 2
    return min(max(0.0, found), math.log(2)) / (math.log(2) if base == "2" else 1.0)
