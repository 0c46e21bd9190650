"""What stands in a block's place while a network's own forward runs, and notes how the block is called."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class StandIn(nn.Module):
    """Answers for a block's plain attributes without holding its parameters.

    values: how many values the block returns; 0 where it returns the hidden state itself.
    """

    hidden: Tensor  # that it was called with
    call: tuple[tuple[Any, ...], dict[str, Any]]  # the other arguments

    def __init__(self, block: nn.Module, values: int) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)  # not a submodule: only its plain attributes are wanted
        self.values = values

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def note(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Keep a call's arguments; returns its hidden state."""
        self.hidden = args[0] if args else kwargs.pop("hidden_states")
        self.call = (args[1:], kwargs)
        return self.hidden

    def returned(self, hidden: Tensor) -> Any:
        """A hidden state in the shape of what the block returns."""
        return (hidden, *[None] * (self.values - 1)) if self.values else hidden


class Passing(StandIn):
    """Hands on a given hidden state, or its input where none is given."""

    def __init__(self, block: nn.Module, values: int, given: Tensor | None = None) -> None:
        super().__init__(block, values)
        self.given = given

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.note(args, kwargs)
        return self.returned(hidden if self.given is None else self.given)
