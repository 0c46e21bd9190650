"""ACT: attention that lies idle on sinks behind the first token is given to the other tokens, in heads that gain by it.

    s_j = mean over rows i >= j of A_ij                   attention that token j receives, in one head's map A [T, T]
    S   = {j : s_j > alpha / T}, never the first token    its sinks; alpha = 5
    A_ij <- beta A_ij                                     j in S; beta = 0.4
    A_ij <- A_ij + (1 - beta) sum_S A_i. * A_ij / sum_{k not in S} A_ik        j not in S

Rows still sum to one; a row whose whole mass lies on sinks is left as it is. The maps change while the prompt is read;
behind it the prompt's sinks stay the sinks, and new tokens are none (the paper says nothing of decoding).

Which heads gain is learned on text (``layerwise fit act MODEL OUT --text TEXT``): each head is calibrated alone, and
kept if the likelihood of the right next token behind windows of the text rises by more than one standard error. The
first two blocks and the last are left alone. The paper counts right answers of multiple-choice questions instead, which
takes labels and moves in steps of one question.

Measured on docs-lm, 400 windows of 48 tokens, two seeds: 63.5 % of next tokens wrong, 63.6 % without calibration and
64.1 % with as many other heads: no gain that such a count could tell from none. Calibrating every head that may be
costs 3.5 points, so the choice of heads is what keeps it harmless; the first token as well makes no difference.

Source: Z. Yu et al., "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training
through Attention Calibration", arXiv 2406.15765.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from layerwise.errors import InputError
from layerwise.roles import Generator
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from layerwise.engine.progress import Progress
    from layerwise.generate.network import CausalNetwork
    from layerwise.generate.wanted import Emit, Generation, Wanted

Heads = dict[int, list[int]]
"""Block -> its heads that are calibrated."""


@technique(
    paper="ACT",
    left_out="the paper's choice of heads by right answers to labelled questions",
)
class Act(Generator):
    """Plain decoding with the attention of chosen heads taken off the sinks behind the first token."""

    learns = True
    judged_by = "next"
    heads: str = option("", help="block.head, such as 2.0/3.5, or all, or none; layerwise fit act finds them")
    alpha: float = option(5.0, minimum=0.0, help="times the even share that a sink receives")
    beta: float = option(0.4, minimum=0.0, maximum=1.0, help="what is left of a sink's attention")
    first: bool = option(False, help="count the first token among the sinks as well")
    windows: int = option(96, minimum=2, help="windows of text on which heads are tried")
    length: int = option(48, minimum=4, help="tokens of a window")

    def learn(self, network: CausalNetwork, tokens: Tensor, folder: Path, seed: int, progress: Progress) -> Act:
        import torch

        length = min(self.length, network.longest)
        if len(tokens) <= length:
            raise InputError(f"the text has {len(tokens)} tokens, and a window takes {length + 1}; give more text")
        draw = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, len(tokens) - length, (self.windows,), generator=draw).tolist()
        windows = torch.stack([tokens[s : s + length + 1] for s in starts])
        blocks = eligible(len(network.blocks))
        count = int(network.module.config.num_attention_heads)  # type: ignore[union-attr, arg-type]
        with progress.stage("calibrate each head alone", len(blocks) * count) as advance, torch.inference_mode():
            found = []
            for block in blocks:
                before = self._likelihood(network, windows, {}, block)
                for head in range(count):
                    gain = self._likelihood(network, windows, {block: [head]}, block) - before
                    if float(gain.mean()) > float(gain.std() / len(gain) ** 0.5):
                        found.append(f"{block}.{head}")
                    advance()
        return replace(self, heads="/".join(found) or "none", windows=96, length=48)  # type: ignore[type-var]

    def _likelihood(self, network: CausalNetwork, windows: Tensor, heads: Heads, block: int) -> Tensor:
        """log p of each window's last token, ``[windows]``; attention is in the open from ``block`` on."""
        from layerwise.generate.attention_edit import edited

        rows, length = windows.shape
        session, starts = network.session(rows, length - 1), [0] * rows
        hidden = session.run(session.embed(windows[:, :-1], starts), range(block), starts)
        with edited(network, Calibration(heads, self.alpha, self.beta, self.first)):
            hidden = session.run(hidden, range(block, len(network.blocks)), starts)
        likely = session.scores(hidden[:, -1:])[:, 0].float().log_softmax(-1)
        return likely.gather(-1, windows[:, -1:].to(likely.device))[:, 0].cpu()

    def generate(
        self, network: CausalNetwork, prompts: Sequence[Sequence[int]], wanted: Wanted, emit: Emit
    ) -> Generation:
        import torch

        from layerwise.generate.attention_edit import edited
        from layerwise.generate.wanted import Generation, Work

        heads = read_heads(self.heads, len(network.blocks), int(network.module.config.num_attention_heads))  # type: ignore[union-attr, arg-type]
        work, texts, sinks = Work(prefilled=len(prompts)), [], []
        for row, prompt in enumerate(prompts):
            chooser, calibration = wanted.choice.chooser(row), Calibration(heads, self.alpha, self.beta, self.first)
            with torch.inference_mode(), edited(network, calibration):
                began = time.perf_counter()
                session = network.session(1, len(prompt) + wanted.new_tokens, wanted.cache)
                scores = session.scores(session.prefill([prompt]))[0, -1]
                work.prefill_seconds += time.perf_counter() - began
                began = time.perf_counter()
                text: list[int] = []
                while True:
                    kept, over = wanted.cut(network, len(text), [chooser.pick(scores)])
                    text += kept
                    emit(row, kept)
                    if over:
                        break
                    scores = session.full(torch.tensor([text[-1:]]))[0, -1]
                    work.full_passes += 1
                    work.block_passes += len(network.blocks)
                work.decode_seconds += time.perf_counter() - began
            texts.append(tuple(text))
            sinks.append({f"{b}.{h}": places for b, own in calibration.places(heads).items() for h, places in own})
        return Generation(tuple(texts), work, {"sinks": sinks})


@dataclass
class Calibration:
    """The edit of attention maps. ``sinks``: block -> bool [rows, heads, T], found when the prompt was read."""

    heads: Heads
    alpha: float
    beta: float
    first: bool = False
    sinks: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, block: int, maps: Tensor) -> Tensor:
        import torch

        chosen = self.heads.get(block)
        if not chosen:
            return maps
        own = maps[:, chosen]  # [rows, heads, count, end]
        if own.shape[2] > 1:
            self.sinks[block] = find_sinks(own, self.alpha, self.first)
        known = self.sinks.get(block)
        if known is None:
            return maps  # a prompt of one token has no sinks
        behind = own.shape[-1] - known.shape[-1]
        marked = torch.nn.functional.pad(known, (0, behind))
        out = maps.clone()
        out[:, chosen] = calibrated(own, marked, self.beta)
        return out

    def places(self, heads: Heads) -> dict[int, list[tuple[int, list[int]]]]:
        """Block -> (head, positions of its sinks) of the first row."""
        return {
            block: [(head, found[0, i].nonzero()[:, 0].tolist()) for i, head in enumerate(heads[block])]
            for block, found in self.sinks.items()
        }


def find_sinks(maps: Tensor, alpha: float, first: bool = False) -> Tensor:
    """Sinks bool ``[…, T]`` of causal maps ``[…, T, T]``."""
    import torch

    length = maps.shape[-1]
    received = maps.sum(-2) / torch.arange(length, 0, -1, device=maps.device)
    found = received > alpha / length
    if not first:
        found[..., 0] = False
    return found


def calibrated(maps: Tensor, sinks: Tensor, beta: float) -> Tensor:
    """Maps ``[…, rows, T]`` with ``1 - beta`` of what lies on ``sinks`` [… , T] given to the other tokens."""
    import torch

    marked = sinks[..., None, :]
    on = (maps * marked).sum(-1, keepdim=True)
    off = (maps * ~marked).sum(-1, keepdim=True)
    grown = maps * (1 + (1 - beta) * on / off)
    return torch.where(off > 0, torch.where(marked, beta * maps, grown), maps)


def eligible(blocks: int) -> range:
    """Blocks that may be calibrated: neither the first two nor the last, where there are so many."""
    start = min(2, max(0, blocks - 2))
    return range(start, max(start + 1, blocks - 1))


def read_heads(text: str, blocks: int, heads: int) -> Heads:
    """``2.0/3.5`` -> {2: [0], 3: [5]}. Raises ``InputError`` for heads that the network does not have."""
    if not text:
        raise InputError(
            "act needs heads, written act:heads=2.0/3.5; find them with: layerwise fit act MODEL OUT --text TEXT"
        )
    if text == "none":
        return {}
    if text == "all":
        return {block: list(range(heads)) for block in eligible(blocks)}
    found: Heads = {}
    for part in text.split("/"):
        block, dot, head = part.partition(".")
        if not (dot and block.isdecimal() and head.isdecimal()) or int(block) >= blocks or int(head) >= heads:
            raise InputError(
                f"heads are written block.head, such as 2.0/3.5, not {part!r}; this network has {blocks} blocks of "
                f"{heads} heads, which count from 0"
            )
        found.setdefault(int(block), []).append(int(head))
    return {block: sorted(set(own)) for block, own in found.items()}
