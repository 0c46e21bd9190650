"""Small lessons on made-up vectors, in which it is known what a teacher's states are good for."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from layerwise.distill.field import drawn_linear
from layerwise.distill.lesson import Lesson, Seen


class Stack(nn.Module):
    """``x -> h = tanh(A x) -> head h``; ``noise`` more features beside h are read by nobody."""

    def __init__(self, inputs: int, width: int, classes: int, seed: int, noise: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.body, self.head = drawn_linear(inputs, width, generator), drawn_linear(width, classes, generator)
        self.noise = drawn_linear(inputs, noise, generator) if noise else None
        with torch.no_grad():
            for linear in (self.body, self.head):
                linear.weight.mul_(4)
            if self.noise is not None:
                self.noise.weight.mul_(4)

    def state(self, x: Tensor) -> Tensor:
        useful = self.body(x).tanh()
        return useful if self.noise is None else torch.cat([useful, 3 * self.noise(x).tanh()], -1)

    def read(self, state: Tensor) -> Tensor:
        return self.head(state[..., : self.head.in_features])  # type: ignore[no-any-return]


class StackLesson(Lesson):
    """Two stacks on Gaussian inputs; outputs are logits, or unit vectors."""

    def __init__(self, student: Stack, teacher: Stack, inputs: int, embeds: bool = False, seed: int = 0) -> None:
        self.student, self.teacher, self.embeds, self.seed = student, teacher, embeds, seed
        self.parts, self.judged = 24, 4
        self.x = torch.randn(28, 64, inputs, generator=torch.Generator().manual_seed(seed))

    @property
    def names(self) -> tuple[str, ...]:
        return ("block 1",)

    def see(self, module: nn.Module, part: int, without: Collection[int] = ()) -> Seen:
        assert isinstance(module, Stack)
        state = module.state(self.x[part])
        return Seen(self.given(module.read(state)), (state,))

    def given(self, output: Tensor) -> Tensor:
        return nn.functional.normalize(output, dim=-1) if self.embeds else output

    def finish(self, state: Tensor, part: int) -> Tensor:
        assert isinstance(self.teacher, Stack)
        return self.given(self.teacher.read(state))

    def distances(self, teacher: Tensor, student: Tensor) -> Tensor:
        if self.embeds:
            return (teacher - student).square().sum(-1)
        p, q = teacher.log_softmax(-1), student.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)
