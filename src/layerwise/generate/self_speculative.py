"""Self-speculative decoding: the network's own first blocks draft, all blocks verify, one cache serves both.

    exit   blocks 1 … E and the shared head draft token by token; their states h_E wait, and verification runs blocks
           E + 1 … L over all of them at once, on keys and values of blocks 1 … E that are there already
    skip   all blocks but a set S draft; verification runs all blocks over the tokens and overwrites what drafting wrote

With agreement a between draft and network, a round of g drafts gives (1 - a^{g+1}) / (1 - a) tokens. In weights read,
with b bytes a block and v bytes a head, it costs

    exit   (g + 1) E b + g v + (L - E) b + v        skip   g ((L - |S|) b + v) + L b + v

against L b + v for a plain token. The exit (or the set) with the best ratio is taken, its agreement measured on the
prompt: the share of its last tokens at which an exit's choice is the network's, or 1 minus the distance in variation
when tokens are drawn. An exit drafts on while it is sure enough of its next token to pay for it (``confidence.py``):
where it is not, all that was spent is one look at the head, since its states are verification's. For skipped blocks
agreement is followed while decoding and g chosen anew each round; where no g pays, rounds are plain steps. A number of
drafts that is given (``tokens``) is kept, until acceptance is below ``floor`` over five rounds.

Source: M. Elhoushi et al., "LayerSkip", arXiv 2404.16710, for exits with one cache and reused states; J. Zhang et al.,
"Draft & Verify", arXiv 2309.08168, for skipped blocks, and for drafts that end where they are unsure (below a threshold
that follows a wanted acceptance). LayerSkip fixes E and g by hand; choosing E on the prompt, and the threshold, by the
cost above is ours. Blocks to skip are those that turn the prompt's states least, never the first or the last. The
paper's training, which makes exits agree, is a distiller (``distill/layer_skip.py``); without it they agree less. On
docs-lm, 5 blocks without it, four drafts a round take 0.74 (exit) and 0.36 (skip) full passes a token with 9 % and 46 %
of drafts accepted, but 1.9 and 1.6 times the time of plain decoding. Left to choose, exits take 0.87 full passes and
1.07 times the time there, and skipped blocks draft next to nothing, in 1.09 times.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from layerwise.roles import Generator
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from layerwise.generate.network import CausalNetwork
    from layerwise.generate.wanted import Emit, Generation, Wanted


@technique(
    paper="LayerSkip",
    menu=("draft=exit", "draft=skip"),
)
class SelfSpeculative(Generator):
    """The network's first blocks draft, the others verify: plain decoding's tokens in fewer full passes."""

    lossless = True
    draft: str = option("auto", choices=("auto", "exit", "skip"), help="first blocks only, or some blocks skipped")
    exit: int = option(0, minimum=0, help="blocks that draft; 0 chooses on the prompt")
    skip: str = option("auto", help="blocks that drafting skips, such as 3-5 or 2/4; auto chooses on the prompt")
    tokens: int = option(0, minimum=0, maximum=32, help="tokens of a draft; 0 chooses before each round")
    most: int = option(8, minimum=1, maximum=32, help="tokens of a draft at most, when they are chosen")
    floor: float = option(0.2, minimum=0.0, maximum=1.0, help="acceptance below which drafting stops")

    def generate(
        self, network: CausalNetwork, prompts: Sequence[Sequence[int]], wanted: Wanted, emit: Emit
    ) -> Generation:
        import torch

        from layerwise.generate.own_drafts import Plan, choose_plan, fixed_plan
        from layerwise.generate.speculation import speculate
        from layerwise.generate.wanted import Generation, Work

        fixed = fixed_plan(network, self.draft, self.exit, self.skip)
        work, texts, plans = Work(prefilled=len(prompts)), [], []
        for row, prompt in enumerate(prompts):
            chooser = wanted.choice.chooser(row)
            with torch.inference_mode():
                began = time.perf_counter()
                session = network.session(1, len(prompt) + wanted.new_tokens, wanted.cache)
                seen: list[torch.Tensor] = []
                scores = session.scores(session.prefill([prompt], seen))[0, -1]
                plan: Plan = choose_plan(
                    session, prompt, seen, wanted.choice, fixed, self.draft, self.most, self.tokens
                )
                draft, pace = plan.drafting(self.tokens, self.most, self.floor)
                del seen
                work.prefill_seconds += time.perf_counter() - began
                began = time.perf_counter()
                text = speculate(
                    session, chooser.pick(scores), draft, pace, chooser, wanted, work,
                    lambda tokens, row=row: emit(row, tokens),  # type: ignore[misc]
                )  # fmt: skip
                work.decode_seconds += time.perf_counter() - began
            texts.append(tuple(text))
            plans.append(str(plan))
        return Generation(tuple(texts), work, {"drafts": plans})
