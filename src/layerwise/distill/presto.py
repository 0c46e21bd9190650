"""Presto-L: blocks are left out in front of the last one, so that the last keeps the hidden state it is made for.

    depth n of K:   active = {1, …, n - 1, K}        (the rule before it, ASE:  {1, …, n})

A residual stream grows with depth: its variance is largest where the last block and the head read it. Leaving out the
tail hands the head a state of an earlier scale; keeping the last block hands the head what it was made for. Every step
draws a depth n from ``ceil(shallowest K) … K``, runs the student with only those blocks, and lowers

    L = KL(T || S_n) + v mean_c (log rms_c(t_L) - log rms_c(s_K))^2

where rms_c is the root mean square of a channel over the tokens: what the output layer reads keeps the variance that it
had in the teacher. Every second step takes the full depth. The student is one plain network that serves at any of these
depths: blocks in front of the last can be taken out later (``drop_block``) without another training.

Source: Z. Novack et al., "Presto! Distilling Steps and Layers for Accelerating Music Generation", arXiv 2410.05167 (no
code). There the depth follows the noise level of a diffusion transformer and is told to the network by an embedding.
Here there is neither noise nor a place for an embedding in a plain checkpoint: the depth is drawn. The variance term is
our completion; the paper keeps the variance by the rule alone. ``keep=first`` is ASE's rule, the ablation.

Measured on ``examples/docs-lm``, 4 of its 5 blocks, 40 steps, two seeds, held-out KL to the dense network: with two
blocks left out 1.60 against 1.78 for ASE's rule and 1.79 for plain logits; with one left out 1.14 against 1.05 and
1.23; at full depth 0.657 against 0.645 and 0.618. So the last block is worth keeping when much is left out, and on
this small network not when little is; and what other depths learn is paid for at full depth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Distiller
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.distill.lesson import Distilled, Lesson


@technique(
    paper="Presto!",
    left_out="step distillation (Presto-S), the depth's schedule over noise levels and its budget embedding: "
    "no diffusion network is trained here",
)
class Presto(Distiller):
    """The student learns the teacher's outputs at every depth, its last block always kept."""

    rivals = ("logits", "presto:keep=first")
    studies = ("depths",)

    steps: int = option(200, minimum=0, maximum=1_000_000, help="steps of Adam")
    sequences: int = option(8, minimum=1, maximum=4096, help="sequences a step")
    rate: float = option(0.001, minimum=0, maximum=1, help="peak rate")
    shallowest: float = option(0.5, minimum=0.01, maximum=1, help="least share of the student's blocks that run")
    keep: str = option("last", choices=("last", "first"), help="which block is never left out")
    variance: float = option(0.1, minimum=0, maximum=1000, help="weight of the last state's variance")

    def check(self, lesson: Lesson) -> None:
        from layerwise.distill._outputs import check_widths
        from layerwise.distill.text import TextLesson
        from layerwise.errors import InputError

        check_widths(self, lesson)
        if not isinstance(lesson, TextLesson):
            raise InputError("presto leaves out blocks of a transformer, and this network has none")

    def distill(self, lesson: Lesson) -> Distilled:
        import math

        import torch

        from layerwise.distill._depth import log_rms, without_at
        from layerwise.distill._outputs import softened
        from layerwise.distill._training import fit

        self.check(lesson)
        blocks = len(lesson.names)
        least = max(1, math.ceil(self.shallowest * blocks))
        generator = torch.Generator().manual_seed(lesson.seed)
        depths = torch.randint(least, blocks + 1, (max(1, self.steps),), generator=generator).tolist()

        def at(depth: int, part: int) -> Tensor:
            other = lesson.taught(part)
            mine = lesson.see(lesson.student, part, without_at(depth, blocks, self.keep))
            found = softened(lesson, other.output, mine.output)
            if self.variance and mine.states[-1].shape[-1] == other.states[-1].shape[-1]:
                found = found + self.variance * (log_rms(other.states[-1]) - log_rms(mine.states[-1])).square().mean()
            return found

        def loss(step: int, part: int) -> Tensor:
            return at(blocks if step % 2 else depths[step], part)

        def judge(part: int) -> tuple[Tensor, int]:
            """At full depth, and at one of the others in turn."""
            wanted, sums = lesson.taught(part).output, []
            for depth in (blocks, least + part % (blocks - least + 1)):
                mine = lesson.see(lesson.student, part, without_at(depth, blocks, self.keep)).output
                sums.append(lesson.distances(wanted, mine).sum())
            return torch.stack(sums).mean(), len(wanted)

        return fit(self, lesson, self.rate, loss, judge=judge)
