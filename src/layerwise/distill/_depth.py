"""Which blocks run when a network runs with fewer of them, and how large its hidden states are."""

from __future__ import annotations

from torch import Tensor


def without_at(depth: int, blocks: int, keep: str = "last") -> tuple[int, ...]:
    """The blocks that are left out at a depth: those right in front of the last one, or the tail (``first``)."""
    return tuple(range(depth - 1, blocks - 1)) if keep == "last" else tuple(range(depth, blocks))


def log_rms(state: Tensor) -> Tensor:
    """Logarithm of each channel's root mean square over the tokens [width]."""
    return 0.5 * state.square().mean(0).clamp(min=1e-12).log()
