"""TED: filters pass on what of a hidden state serves the task, and only that is matched.

Stage I, both networks frozen, for every pair (student block k, teacher block j(k)):

    g(f_k^t(t_j)),  g(f_k^s(s_k))  ->  the teacher's output         f = B A,  A [r, d],  B [p, r]

Each filter f (linear, d -> r -> p, p the teacher's width) is trained to make the task's prediction from this layer
alone; g is the teacher's own final norm and head, frozen. Stage II, teacher and its filters frozen:

    L = T^2 KL(T || S) + w (1 / K) sum_k |f_k^s(s_k) - f_k^t(t_j(k))|^2 / |f_k^t(t_j(k))|^2

over the student and the student's filters, which are dropped at the end. Directions that no prediction needs are
filtered out of the target, so that a small student does not spend its width on them; r < d makes this a real choice,
since a full-rank linear could be any change of basis.

Source: C. Liang et al., "Less is More: Task-aware Layer-wise Distillation for Language Model Compression", arXiv
2210.01351. Left open there or not to be had here, and chosen: a vocabulary-sized head per layer is too large, so g is
the teacher's head, which also puts both filters into one basis; the task is the teacher's own prediction instead of
labels, so that any text and any encoder will do; r is half the width; stage I is a quarter of the steps, which are
counted, so that the student has fewer steps than a rival. ``learned=false`` keeps filters of the same shape as drawn,
the ablation.

Measured: where 32 features that nothing reads stand beside 8 that the head reads, 300 steps end at less than 0.7 of the
loss of ``logits``, ``hidden`` and drawn filters (``tests/distill/test_ted.py``). On ``examples/docs-lm`` with 3 of its
5 blocks and 40 steps, two seeds, the held-out KL is 0.750, with drawn filters 0.724, with ``hidden`` 0.710 and with
``logits`` 0.727: a negative result. So few steps are too dear to spend a quarter of them on filters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Distiller
from layerwise.technique import option, technique

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from torch.nn import Module, ModuleList

    from layerwise.distill.lesson import Distilled, Lesson, Seen


CLOSED = 0.1  # of a projection, where a filter's training begins


@technique(paper="TED", left_out="labels of a fine-tuned task, heads of their own for the filters, non-linear filters")
class Ted(Distiller):
    """The student learns the teacher's outputs, and what of its hidden states learnt filters let through."""

    rivals = ("logits", "hidden", "ted:learned=false")

    steps: int = option(200, minimum=0, maximum=1_000_000, help="steps of Adam, both stages")
    sequences: int = option(8, minimum=1, maximum=4096, help="sequences a step")
    rate: float = option(0.001, minimum=0, maximum=1, help="peak rate")
    weight: float = option(1.0, minimum=0, maximum=1000, help="of the filtered states beside the output")
    rank: float = option(0.5, minimum=0.01, maximum=1, help="of the filters, as a share of the width")
    first: float = option(0.25, minimum=0, maximum=0.9, help="share of the steps in which filters alone are trained")
    learned: bool = option(True, help="train filters on the task; false keeps them as they are drawn")
    temperature: float = option(1.0, minimum=0.1, maximum=100, help="that softens both outputs")

    def check(self, lesson: Lesson) -> None:
        from layerwise.distill._outputs import check_widths
        from layerwise.distill.lesson import Lesson as Plain
        from layerwise.errors import InputError

        check_widths(self, lesson)
        if type(lesson).finish is Plain.finish:
            raise InputError("ted reads every layer through the teacher's head, which this network has none of")

    def distill(self, lesson: Lesson) -> Distilled:
        import torch
        from torch import nn

        from layerwise.distill._layers import gaps, matchers
        from layerwise.distill._outputs import softened
        from layerwise.distill._training import fit

        self.check(lesson)
        matched, _ = matchers(lesson)
        with torch.no_grad():
            here, there = lesson.see(lesson.student, 0), lesson.taught(0)
        generator = torch.Generator().manual_seed(lesson.seed)
        mine_of = nn.ModuleList(self.filter_of(here, there, k, generator) for k, _ in matched)
        theirs_of = nn.ModuleList(self.filter_of(there, there, j, generator) for _, j in matched)
        filters = nn.ModuleDict({"student": mine_of, "teacher": theirs_of})
        begins = round(self.first * self.steps) if self.learned else 0

        def task(states: list[Tensor], maps: ModuleList, wanted: Tensor, part: int) -> Tensor:
            found = [lesson.finish(f(h), part) for f, h in zip(maps, states, strict=True)]
            return torch.stack([lesson.distances(wanted, out).mean() for out in found]).mean()

        def loss(step: int, part: int) -> Tensor:
            other = lesson.taught(part)
            if step < begins:
                with torch.no_grad():
                    mine = lesson.see(lesson.student, part)
                return task([mine.states[k] for k, _ in matched], mine_of, other.output, part) + task(
                    [other.states[j] for _, j in matched], theirs_of, other.output, part
                )
            theirs_of.requires_grad_(False)
            mine = lesson.see(lesson.student, part)
            layers = gaps(mine, other, matched, mine_of, theirs_of)
            return softened(lesson, other.output, mine.output, self.temperature) + self.weight * layers

        return fit(self, lesson, self.rate, loss, extra=filters, extra_rate=self.rate, begins=begins)

    def filter_of(self, seen: Seen, teacher: Seen, place: int, generator: Generator) -> Module:
        """A filter of the state at ``place`` to the teacher's width; where widths agree it starts as a projection."""
        from torch import nn

        from layerwise.distill._layers import orthonormal

        width, out = seen.states[place].shape[-1], teacher.states[-1].shape[-1]
        rank = max(1, round(self.rank * min(width, out)))
        down = orthonormal(width, rank, generator)
        up = orthonormal(rank, out, generator)
        if width == out:
            up.weight.data.copy_(down.weight.data.T)
        if self.learned:  # nearly closed: what no prediction asks for never grows
            up.weight.data.mul_(CLOSED)
        return nn.Sequential(down, up)
