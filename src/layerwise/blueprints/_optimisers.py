"""The optimisers of blueprints, as groups that remember their peak rate and decay, and Muon.

Muon (K. Jordan et al., 2024) makes the step of a matrix a nearly orthogonal one, which prefers no channel:

    M <- m M + G,    N = G + m M,    W <- (1 - rate decay) W - rate 0.2 sqrt(max(rows, columns)) NS(N)

The factor gives a step the root mean square of Adam's, so Adam's rates carry over. NS is five steps of Newton-Schulz,

    Z <- N / ||N||_F,    A = Z Z^T,    Z <- 3.4445 Z + (-4.7750 A + 2.0315 A^2) Z

on the matrix or its transpose, whichever is wide, in float32; singular values end between about 0.68 and 1.14.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
MOMENTUM = 0.95
LIKE_ADAM = 0.2  # root mean square of Adam's step, in rates
BETAS = (0.9, 0.95)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Newton-Schulz: about ``U V^T`` of ``matrix`` [rows, columns] = U S V^T; zero stays zero."""
    wide = matrix.float() if matrix.shape[0] <= matrix.shape[1] else matrix.float().T
    a, b, c = NEWTON_SCHULZ
    z = wide / wide.norm().clamp(min=1e-20)
    for _ in range(ROUNDS):
        gram = z @ z.T
        z = a * z + (b * gram + c * gram @ gram) @ z
    return z if matrix.shape[0] <= matrix.shape[1] else z.T


class Muon(torch.optim.Optimizer):
    """For matrices only; see above."""

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float, decay: float) -> None:
        super().__init__(parameters, {"lr": rate, "weight_decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.mul_(MOMENTUM).add_(parameter.grad)
                step = orthogonalised(parameter.grad + MOMENTUM * momentum)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(step, alpha=-group["lr"] * LIKE_ADAM * math.sqrt(max(parameter.shape)))


def adam(parameters: Iterable[nn.Parameter], rate: float, decay: float) -> torch.optim.Optimizer:
    """AdamW; scalars and vectors do not decay."""
    found = list(parameters)
    groups = [
        {"params": [p for p in found if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in found if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, betas=BETAS)


def muon(parameters: Iterable[nn.Parameter], rate: float, decay: float) -> torch.optim.Optimizer:
    return Muon(parameters, rate, decay)


def warmed(share: float, warmup: float = 0.05) -> float:
    """Up to one over the first ``warmup`` of the run."""
    return min(1.0, share / warmup)


def cosine(share: float, least: float = 0.1) -> float:
    """Half a cosine from one down to ``least``."""
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * share))
