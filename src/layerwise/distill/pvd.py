"""PVD: the cheap inner quantities of a network are taught first, its expensive output last.

    stage A (``first`` of the steps)    L = w |s_a - t_a|^2 / |t_a|^2                      the shallow states a
    stage B (``second``)                L = as A, and the same for the deeper states b
    stage C (the rest)                  L = d(T, S) + decaying w (A + B)                   the output

Made for fields: a network that gives features, density and colour at a point in space, and pixels only by summing many
points along a ray. There a = features, b = logarithm of the density, clipped to [-2, 7], and colour, and the output is
pixels; beyond the clip space is empty, or opaque, whatever the value, and raw densities would outweigh all else. Points
count half by how much of a pixel they make and half evenly; evenly alone, a student would spend itself on empty space.
Student and teacher may be of different architectures: a learnt map on the student's side stands between features of
different widths. On any other network the first half of its blocks is a and the second b.

Source: S. Fang et al., "One is All: Bridging the Gap Between Neural Radiance Fields Architectures with Progressive
Volume Distillation", arXiv 2211.15977. Chosen where it was left open: the stages' shares, w = 0.1, errors as a share of
the teacher's mean square, the points' weights, and that w falls to zero over stage C. ``density=raw`` and
``density=log`` leave the logarithm or the clip out, ``stages=false`` is stage C from the start: the ablations. It
converts one architecture into another, and is no compression by itself.

Measured, two seeds: a perceptron of 4,548 values after a grid of 221,252, 400 steps, squared error of pixels on views
that neither saw: 0.00066, without stages 0.00089, with raw densities 0.00086, from pixels alone 0.00187. On 3 of 5
blocks of ``examples/docs-lm``, 40 steps: held-out KL 0.684, without stages 0.725, plain ``logits`` 0.727. Without the
points' weights the inner quantities did harm: pixels alone were better.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Distiller
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.distill.lesson import Distilled, Lesson

CLIP = (-2.0, 7.0)  # of the density's logarithm


@technique(
    paper="PVD",
    left_out="hash grids, tensor factors and voxels of scenes that were photographed, and the last tuning on their "
    "images: a scene of coloured blobs, a plain grid and a perceptron stand for them",
)
class Pvd(Distiller):
    """The student learns the teacher's inner quantities first, shallow to deep, and its output last."""

    rivals = ("logits", "pvd:density=raw", "pvd:stages=false")
    studies = ("field", "text")

    steps: int = option(200, minimum=0, maximum=1_000_000, help="steps of Adam")
    sequences: int = option(8, minimum=1, maximum=4096, help="sequences a step")
    rate: float = option(0.001, minimum=0, maximum=1, help="peak rate")
    first: float = option(0.1, minimum=0, maximum=1, help="share of the steps for the shallow states alone")
    second: float = option(0.2, minimum=0, maximum=1, help="share of the steps for all states")
    weight: float = option(0.1, minimum=0, maximum=1000, help="of the states")
    density: str = option("clipped", choices=("clipped", "log", "raw"), help="how a field's density is compared")
    stages: bool = option(True, help="states before the output; false begins with the last stage")

    def check(self, lesson: Lesson) -> None:
        from layerwise.distill._outputs import check_widths
        from layerwise.errors import InputError

        check_widths(self, lesson)
        if self.first + self.second > 1:
            raise InputError("pvd's first and second stage take more than all of the steps; first + second <= 1")

    def distill(self, lesson: Lesson) -> Distilled:
        import torch

        from layerwise.distill._layers import gap, matchers
        from layerwise.distill._outputs import softened
        from layerwise.distill._training import fit

        self.check(lesson)
        matched, maps = matchers(lesson)
        names = lesson.names
        shallow = max(1, len(matched) // 2)
        until_b = round(self.first * self.steps) if self.stages else 0
        until_c = until_b + round(self.second * self.steps) if self.stages else 0

        def loss(step: int, part: int) -> Tensor:
            other, mine = lesson.taught(part), lesson.see(lesson.student, part)
            mass, terms = lesson.mass(other), []
            for place, ((k, j), own) in enumerate(zip(matched, maps, strict=True)):
                if place < shallow or step >= until_b:
                    their, state = other.states[j], own(mine.states[k])
                    if names[k] == "density":
                        their, state = (self.compared(x) for x in (their, state))
                    terms.append(gap(state, their, mass))
            inner = self.weight * torch.stack(terms).mean()
            if step < until_c:
                return inner
            left = 1 - (step - until_c) / max(1, self.steps - until_c)
            return softened(lesson, other.output, mine.output) + left * inner

        return fit(self, lesson, self.rate, loss, extra=maps)

    def compared(self, log_density: Tensor) -> Tensor:
        """What is compared of a density, which comes as its logarithm."""
        if self.density == "raw":
            return log_density.exp()
        return log_density.clamp(*CLIP) if self.density == "clipped" else log_density
