"""Layer-wise distillation: beside the output, every block of the student is drawn towards one of the teacher's.

    L = KL(T || S) + w (1 / K) sum_k |P_k s_k - t_j(k)|^2 / |t_j(k)|^2

Student block k of K stands for the teacher's block ``j(k) = round((k + 1) L / K) - 1``, the last of the k-th of equal
intervals. P_k is the identity where the widths are equal, and else a learnt linear [teacher, student] that is dropped
afterwards. The whole hidden state is matched, whether or not anything that follows reads it.

Source: X. Jiao et al., "TinyBERT", arXiv 1909.10351, and S. Sun et al., "Patient Knowledge Distillation", arXiv
1908.09355, of which this is the common part: the baseline that TED is held against ("LWD"). Choices of ours: each
layer's error is taken as a share of the teacher's mean square, so that no layer outweighs the rest by its scale; the
output's and the layers' terms are lowered together, where TinyBERT takes them one after the other.

Measured on ``examples/docs-lm`` with 3 of its 5 blocks, 40 steps of 4 sequences, two seeds: held-out KL 0.710 against
0.727 for ``logits``, less than the seeds differ by (0.027).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Distiller
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.distill.lesson import Distilled, Lesson


@technique(paper="LWD")
class Hidden(Distiller):
    """The student learns the teacher's outputs and its hidden states."""

    steps: int = option(200, minimum=0, maximum=1_000_000, help="steps of Adam")
    sequences: int = option(8, minimum=1, maximum=4096, help="sequences a step")
    rate: float = option(0.001, minimum=0, maximum=1, help="peak rate")
    weight: float = option(1.0, minimum=0, maximum=1000, help="of the hidden states beside the output")
    temperature: float = option(1.0, minimum=0.1, maximum=100, help="that softens both outputs")

    def check(self, lesson: Lesson) -> None:
        from layerwise.distill._outputs import check_widths

        check_widths(self, lesson)

    def distill(self, lesson: Lesson) -> Distilled:
        from torch import nn

        from layerwise.distill._layers import gaps, matchers
        from layerwise.distill._outputs import softened
        from layerwise.distill._training import fit

        self.check(lesson)
        matched, maps = matchers(lesson)
        as_it_is = [nn.Identity()] * len(matched)

        def loss(step: int, part: int) -> Tensor:
            other, mine = lesson.taught(part), lesson.see(lesson.student, part)
            layers = gaps(mine, other, matched, maps, as_it_is)
            return softened(lesson, other.output, mine.output, self.temperature) + self.weight * layers

        return fit(self, lesson, self.rate, loss, extra=maps)
