"""LayerSkip's training: blocks are dropped at random, the later the oftener, and every block is read by the one head.

    p_l = p_max (2^{l / (L-1)} - 1),  l = 0 … L-1        of a sequence passing block l by: h_l = h_{l-1}
    L   = sum_l w_l CE(head(norm(h_l)), y),  w_l = C(t, l) e(l) / sum_i C(t, i) e(i)
    e(l) = s (0 + 1 + … + l) for l < L-1;   e(L-1) = (L-1) + s (0 + … + (L-2))

C chooses the exits of a step: ``rotational`` takes, beside the last, the blocks with ``l mod R = t mod R``; ``gradual``
adds one from the last down every steps / (2 L). A dropped block is the identity and nothing is rescaled. All exits
share the network's own norm and head, so that the trained network is the checkpoint that it was, and ``layerwise
generate`` drafts by its first blocks (``self_speculative``) or leaves there (``early_exit``). It is its own student:

    layerwise tune MODEL OUT --teacher MODEL --technique layer_skip --calibrate text.txt

The state kept is that of the least judged loss over all exits, weighed as above with C = 1 and nothing dropped.

Source: M. Elhoushi et al., "LayerSkip", arXiv 2404.16710; S(t) = 1, the paper's choice for a network that is trained
already. Choices of ours: R is half of the blocks unless given; ``learn=teacher`` puts the teacher's output in the place
of the text's next token, for encoders; when the gradual curriculum is over is not in the paper. ``drop=0`` and
``scale=0`` are the ablations: with both it is plain training on next tokens.

Measured on a trained network of five blocks and 0.26 million weights (stories260k, the texts that it is made for), 150
steps of 4 sequences, two seeds: behind blocks 2, 3, 4 and 5 it says the held-out text in 3.59, 2.48, 1.99 and 1.57 nats
a token; before 6.90, 3.72, 2.24 and 1.34; without the early-exit loss 5.99, 3.24, 2.10, 1.52; without dropping 3.76,
2.51, 2.00, 1.54. With three blocks drafting four tokens, 0.51 full passes a token, before 0.76 (0.69 and 0.54 without
the one and the other). The early-exit loss does nearly all of it, and the last block pays. On docs-lm, 1e4 to 5e4
tokens of training are too few for any judged improvement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Distiller
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.distill.lesson import Distilled, Lesson, Seen
    from layerwise.distill.text import TextLesson


@technique(paper="LayerSkip", left_out="training from scratch, whose dropping grows with the steps")
class LayerSkip(Distiller):
    """The network learns to be read at every block, so that its first blocks draft what all of them say."""

    rivals = ("logits:steps=0", "layer_skip:drop=0.0", "layer_skip:scale=0.0")
    studies = ("exits",)

    steps: int = option(200, minimum=0, maximum=1_000_000, help="steps of Adam")
    sequences: int = option(8, minimum=1, maximum=4096, help="sequences a step")
    rate: float = option(0.0003, minimum=0, maximum=1, help="peak rate")
    drop: float = option(0.1, minimum=0.0, maximum=0.9, help="probability of passing the last block by")
    scale: float = option(1.0, minimum=0.0, maximum=100.0, help="weight of early exits beside the last block's")
    curriculum: str = option("rotational", choices=("rotational", "gradual", "all"), help="which exits a step trains")
    stride: int = option(0, minimum=0, maximum=1024, help="R of the rotational curriculum; 0 takes half of the blocks")
    learn: str = option("text", choices=("text", "teacher"), help="next tokens of the text, or the teacher's output")

    def check(self, lesson: Lesson) -> None:
        from layerwise.distill._outputs import check_widths
        from layerwise.distill.text import TextLesson
        from layerwise.errors import InputError

        if not isinstance(lesson, TextLesson):
            raise InputError("layer_skip trains the exits of a transformer, and this network has no blocks")
        if self.learn == "text" and lesson.labels(0) is None:
            raise InputError("layer_skip learns from next tokens, which this network does not predict; learn=teacher")
        check_widths(self, lesson)

    def distill(self, lesson: Lesson) -> Distilled:
        import torch

        from layerwise.distill._training import fit
        from layerwise.distill.text import TextLesson

        self.check(lesson)
        assert isinstance(lesson, TextLesson)
        blocks = len(lesson.names)
        chances = self.chances(blocks)
        even = weights(blocks, self.scale, range(blocks))

        def loss(step: int, part: int) -> Tensor:
            generator = torch.Generator().manual_seed(lesson.seed * 1_000_003 + step)
            rows = len(lesson.batches[part].tokens)
            dropped = torch.rand(blocks, rows, generator=generator) < chances[:, None]
            with lesson.dropping(lesson.student, dropped):
                seen = lesson.see(lesson.student, part)
            return self.of_exits(lesson, part, seen, weights(blocks, self.scale, self.exits(step, blocks)))

        def judge(part: int) -> tuple[Tensor, int]:
            terms = int(lesson.batches[part].counted.sum()) if not lesson.embeds else len(lesson.batches[part].tokens)
            return self.of_exits(lesson, part, lesson.see(lesson.student, part), even) * terms, terms

        return fit(self, lesson, self.rate, loss, judge=judge)

    def chances(self, blocks: int) -> Tensor:
        """Probability that a sequence passes each block by [blocks]: 0 for the first, ``drop`` for the last."""
        import torch

        return self.drop * (2 ** (torch.arange(blocks) / max(1, blocks - 1)) - 1)

    def exits(self, step: int, blocks: int) -> list[int]:
        """Blocks whose exit a step trains; the last is always among them."""
        if self.curriculum == "all":
            return list(range(blocks))
        if self.curriculum == "gradual":
            reached = step * 2 * blocks // max(1, self.steps)
            return list(range(max(0, blocks - 1 - reached), blocks))
        stride = self.stride or max(1, blocks // 2)
        return [i for i in range(blocks) if i % stride == step % stride or i == blocks - 1]

    def of_exits(self, lesson: TextLesson, part: int, seen: Seen, shares: dict[int, float]) -> Tensor:
        """The weighed loss of the student's exits."""
        import torch

        from layerwise.distill._outputs import of_labels

        wanted = None if self.learn == "text" else lesson.taught(part).output
        found = []
        for block, share in shares.items():
            last = block == len(seen.states) - 1
            output = seen.output if last else lesson.finish(seen.states[block], part, lesson.student)
            one = of_labels(lesson, part, output) if wanted is None else lesson.distances(wanted, output).mean()
            found.append(share * one if share != 1 else one)
        return found[0] if len(found) == 1 else torch.stack(found).sum()


def weights(blocks: int, scale: float, exits: range | list[int]) -> dict[int, float]:
    """Block -> share of the loss, for the exits that a step trains; those without any are left out."""
    own = {i: scale * i * (i + 1) / 2 for i in range(blocks - 1)}
    own[blocks - 1] = max(1, blocks - 1) + scale * (blocks - 2) * (blocks - 1) / 2
    total = sum(own[i] for i in exits)
    return {i: own[i] / total for i in exits if own[i] > 0}
