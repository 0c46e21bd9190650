"""Plain distillation: the student's output is drawn towards the teacher's, and nothing else is looked at.

    L = (1 - l) T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + l CE(y, z_s)

averaged over tokens (or examples). T^2 keeps the gradient's size as T changes; as T grows it becomes the squared
difference of centred logits, over the number of words. A bare encoder has no logits: there L is the squared distance
of unit vectors. ``labels=1`` leaves the teacher out: the plain fine-tuning that distillation has to beat; y is the next
token, so only a causal language model has it.

Source: G. Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531. Choices of ours: T = 1 and
no labels, because the held-out divergence at T = 1 is what layerwise reports; Adam at a paced rate
(``_training.py``). The floor that every other distiller is measured against.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Distiller
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.distill.lesson import Distilled, Lesson


@technique(paper="KD")
class Logits(Distiller):
    """The student learns the teacher's outputs; the floor that other distillers must beat."""

    rivals = ("logits:steps=0", "logits:labels=1.0")

    steps: int = option(200, minimum=0, maximum=1_000_000, help="steps of Adam")
    sequences: int = option(8, minimum=1, maximum=4096, help="sequences a step")
    rate: float = option(0.001, minimum=0, maximum=1, help="peak rate")
    temperature: float = option(1.0, minimum=0.1, maximum=100, help="that softens both outputs")
    labels: float = option(0.0, minimum=0, maximum=1, help="share of the loss on the text's own next tokens")

    def check(self, lesson: Lesson) -> None:
        from layerwise.distill._outputs import check_labels, check_widths

        check_widths(self, lesson)
        if self.labels:
            check_labels(self, lesson)

    def distill(self, lesson: Lesson) -> Distilled:
        from layerwise.distill._outputs import of_labels, softened
        from layerwise.distill._training import fit

        self.check(lesson)

        def loss(step: int, part: int) -> Tensor:
            mine = lesson.see(lesson.student, part).output
            if self.labels == 1:
                return of_labels(lesson, part, mine)
            found = softened(lesson, lesson.taught(part).output, mine, self.temperature)
            return found if not self.labels else found.lerp(of_labels(lesson, part, mine), self.labels)

        return fit(self, lesson, self.rate, loss)
