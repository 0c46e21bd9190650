"""Parts of a network in which no channel is privileged: a norm of one gain, and projections beside the tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SingleScaleNorm(nn.Module):
    """``y = gain x / rms(x)`` with one gain for all channels, so ``norm(x Q) = norm(x) Q`` for orthogonal Q."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.width, self.epsilon = width, epsilon
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon))

    def channels(self) -> Tensor:
        """The gain as the vector [width] that a plain RMSNorm holds."""
        return self.gain.detach().expand(self.width).clone()


class ProjectedTable(nn.Module):
    """``h = E[token] P``: a table E [words, d] behind which lies a trained matrix P [d, d]."""

    def __init__(self, table: nn.Embedding, projection: Tensor) -> None:
        super().__init__()
        self.table, self.projection = table, nn.Parameter(projection)

    def forward(self, index: Tensor) -> Tensor:
        return self.table(index) @ self.projection  # type: ignore[no-any-return]

    def folded(self) -> Tensor:
        """E P [words, d]."""
        return (self.table.weight.detach().double() @ self.projection.detach().double()).float()


class ProjectedHead(nn.Module):
    """``logits = (h P) U^T``: a trained matrix P [d, d] before a head U [words, d]."""

    def __init__(self, head: nn.Linear, projection: Tensor) -> None:
        super().__init__()
        self.head, self.projection = head, nn.Parameter(projection)

    def forward(self, h: Tensor) -> Tensor:
        return self.head(h @ self.projection)  # type: ignore[no-any-return]

    def folded(self) -> Tensor:
        """U P^T [words, d]."""
        return (self.head.weight.detach().double() @ self.projection.detach().double().T).float()


def orthogonal(width: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [width, width], evenly drawn."""
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()
