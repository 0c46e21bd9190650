"""TinyCLIP: an encoder of pairs is distilled by its table of similarities, not by its vectors.

With unit vectors u_i of one side and v_j of the other in a batch of N pairs, and a temperature tau,

    A[i, j] = softmax_j(u_i . v_j / tau),   B[i, j] = softmax_i(u_i . v_j / tau)
    L = KL(A^teacher || A^student) + KL(B^teacher || B^student)           (the paper's cross-entropies, less a constant)

The table is all that retrieval uses. It does not change when a network turns all of its vectors by one orthogonal map,
nor does it ask for vectors of the teacher's width, so the student is free in what its vectors are. The student
should begin from parts of the teacher's weights, as the paper does
(``distill/inherit.py``; ``drop_block`` and structured pruning make such students too).

Source: K. Wu et al., "TinyCLIP: CLIP Distillation via Affinity Mimicking and Weight Inheritance", arXiv 2309.12314.
Choices of ours: both sides go through one encoder of texts (even rows of a batch against odd rows, whether
or not they belong together); one tau serves both networks, since a
plain checkpoint has no place for another; the contrastive loss on true pairs is left out, as is the paper's default.
``mimic=vectors`` lowers the squared distance of the vectors instead, the ablation.

Measured on 2 of 4 blocks of an encoder trained on the example's text, 40 steps, two seeds: of 100 texts 1.1 % miss
their other half, after copying vectors 1.4 % (the seeds differ by 0.3 %); the tables are 0.0075 apart, after copying
vectors 0.0036, after beginning from drawn weights 0.27. So inheritance is what counts here, and where a student can
make the teacher's vectors, copying them gives the better table too: a negative result for the table. Where it cannot,
because it is narrow, the table wins (``tests/distill/test_tinyclip.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Distiller
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.distill.lesson import Distilled, Lesson

FEWEST = 4  # texts on a side: fewer make a table in which nothing is told apart


@technique(
    paper="TinyCLIP",
    left_out="an image tower beside the text tower, learned masks that choose which weights are inherited, "
    "a temperature of the student's own, and the contrastive loss on true pairs",
)
class Tinyclip(Distiller):
    """The student learns the teacher's table of similarities between the texts of a batch."""

    rivals = ("logits", "hidden", "tinyclip:mimic=vectors")
    studies = ("encoder",)

    steps: int = option(200, minimum=0, maximum=1_000_000, help="steps of Adam")
    sequences: int = option(64, minimum=2, maximum=65536, help="texts a step, half of them a side")
    rate: float = option(0.001, minimum=0, maximum=1, help="peak rate")
    temperature: float = option(0.05, minimum=0.001, maximum=10, help="of the similarities")
    mimic: str = option("affinity", choices=("affinity", "vectors"), help="what is copied")

    def check(self, lesson: Lesson) -> None:
        from layerwise.distill._outputs import check_widths
        from layerwise.errors import InputError

        if not lesson.embeds:
            raise InputError("tinyclip compares the vectors of texts, and this network predicts; take a bare encoder")
        if max(len(lesson.taught(part).output) for part in range(min(4, lesson.parts))) < 2 * FEWEST:
            raise InputError(f"tinyclip needs at least {2 * FEWEST} texts a step; give it more sequences")
        if self.mimic == "vectors":
            check_widths(self, lesson)

    def distill(self, lesson: Lesson) -> Distilled:
        from layerwise.distill._tables import affinity_gap
        from layerwise.distill._training import fit

        self.check(lesson)

        def loss(step: int, part: int) -> Tensor:
            other, mine = lesson.taught(part).output, lesson.see(lesson.student, part).output
            if self.mimic == "vectors":
                return lesson.distances(other, mine).mean()
            return affinity_gap(other, mine, self.temperature, self.temperature)

        def judge(part: int) -> tuple[Tensor, int]:
            other, mine = lesson.taught(part).output, lesson.see(lesson.student, part).output
            return affinity_gap(other, mine, self.temperature, self.temperature) * len(mine), len(mine)

        return fit(self, lesson, self.rate, loss, judge=judge)
