"""A lesson of two transformers networks on batches of text: states are what their blocks give, at counted tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.distill.lesson import Keeper, Lesson, Seen
from layerwise.errors import InputError
from layerwise.loss import Loss
from layerwise.network.sites import find_blocks
from layerwise.network.streaming import Batch

IGNORED = -100  # a term without a label, as torch's cross-entropy wants it


class TextLesson(Lesson):
    """Student and teacher read the same tokens; what is compared is the loss's own (``loss.py``).

    train, judge: batches; their rows are divided into parts of at most ``sequences``.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        loss: Loss,
        train: Sequence[Batch],
        judge: Sequence[Batch],
        sequences: int,
        seed: int = 0,
        stepped: Callable[[], None] = lambda: None,
        keeper: Keeper | None = None,
    ) -> None:
        self.student, self.teacher, self.loss, self.seed = student, teacher, loss, seed
        self.embeds = loss.kind == "distance"
        self.batches = [*divided(train, sequences), *divided(judge, sequences)]
        self.parts = len(divided(train, sequences))
        self.judged = len(self.batches) - self.parts
        self.stepped, self.keeper = stepped, keeper
        self._blocks = {id(m): [m.get_submodule(p) for p in find_blocks(m)] for m in (student, teacher)}
        self._tuples: dict[int, bool] = {}  # whether a network's blocks return tuples

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"block {i + 1}" for i in range(len(self._blocks[id(self.student)])))

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        return self._blocks[id(module)]

    def see(self, module: nn.Module, part: int, without: Collection[int] = ()) -> Seen:
        batch, states = self.batches[part], []
        blocks = self.blocks(module)
        with contextlib.ExitStack() as stack:
            if without:
                stack.enter_context(self._passing(module, part, dict.fromkeys(without)))
            for block in blocks:
                handle = block.register_forward_hook(lambda _, __, out: states.append(first_of(out)[batch.counted]))
                stack.callback(handle.remove)
            output = module(**batch.arguments(), use_cache=False)
        return Seen(self.loss.target(output, batch), tuple(states))

    def distances(self, teacher: Tensor, student: Tensor) -> Tensor:
        return self.loss.distances(teacher, student)

    def finish(self, state: Tensor, part: int, by: nn.Module | None = None) -> Tensor:
        """``by``: whose norm and head make the output; the teacher's if None."""
        module = self.teacher if by is None else by
        batch, last = self.batches[part], len(self.blocks(module)) - 1
        hidden = state.new_zeros((*batch.tokens.shape, state.shape[-1]))
        hidden = hidden.index_put((batch.counted,), state)
        given = {i: hidden if i == last else None for i in range(last + 1)}
        with self._passing(module, part, given):
            output = module(**batch.arguments(), use_cache=False)
        return self.loss.target(output, batch)

    @contextlib.contextmanager
    def dropping(self, module: nn.Module, dropped: Tensor) -> Iterator[None]:
        """Some sequences pass some blocks by: ``dropped`` [blocks, sequences of a part] is true where they do."""

        def kept(rows: Tensor) -> Callable[..., Any]:
            def instead(_: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
                given = args[0] if args else kwargs["hidden_states"]
                mixed = torch.where(rows[:, None, None], given, first_of(out))
                return (mixed, *out[1:]) if isinstance(out, tuple) else mixed

            return instead

        with contextlib.ExitStack() as stack:
            for block, rows in zip(self.blocks(module), dropped, strict=True):
                if bool(rows.any()):
                    stack.callback(block.register_forward_hook(kept(rows), with_kwargs=True).remove)
            yield

    def labels(self, part: int) -> Tensor | None:
        """The next token, where there is one."""
        if not self.loss.causal:
            return None
        batch = self.batches[part]
        following = torch.full_like(batch.tokens, IGNORED)
        following[:, :-1] = batch.tokens[:, 1:].masked_fill(~batch.counted[:, 1:], IGNORED)
        return following[batch.counted]

    @contextlib.contextmanager
    def _passing(self, module: nn.Module, part: int, given: dict[int, Tensor | None]) -> Iterator[None]:
        """Some blocks give what is given, or their input, instead of computing."""
        tuples = self._returns_tuples(module, part)

        def instead(state: Tensor | None) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                out = state if state is not None else args[0] if args else kwargs["hidden_states"]
                return (out, None) if tuples else out

            return forward

        blocks = self.blocks(module)
        try:
            for i, state in given.items():
                blocks[i].forward = instead(state)  # type: ignore[method-assign]
            yield
        finally:
            for i in given:
                del blocks[i].forward  # the class's own again

    @torch.no_grad()
    def _returns_tuples(self, module: nn.Module, part: int) -> bool:
        if id(module) not in self._tuples:
            found: list[bool] = []
            batch = self.batches[part].rows(0, 1)
            handle = self.blocks(module)[0].register_forward_hook(
                lambda _, __, out: found.append(isinstance(out, tuple))
            )
            module(**batch.arguments(), use_cache=False)
            handle.remove()
            self._tuples[id(module)] = found[0]
        return self._tuples[id(module)]


def check_same_tables(student: nn.Module, teacher: nn.Module) -> None:
    """``InputError`` unless both know as many words: tokens must mean the same to both."""
    rows = [int(m.get_input_embeddings().weight.shape[0]) for m in (student, teacher)]  # type: ignore[operator]
    if rows[0] != rows[1]:
        raise InputError(
            f"the student's table has {rows[0]} rows and the teacher's {rows[1]}; distillation needs one tokenizer"
        )


def divided(batches: Sequence[Batch], sequences: int) -> list[Batch]:
    """Parts of at most ``sequences`` rows of one batch each."""
    return [
        batch.rows(start, min(start + sequences, len(batch.tokens)))
        for batch in batches
        for start in range(0, len(batch.tokens), sequences)
    ]


def first_of(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]
