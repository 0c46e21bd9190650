"""Linears that hold a latent weight and multiply by three levels of it; see ``trilm``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layerwise.encoding.scales import Scales
from layerwise.encoding.ternary import Ternary

EPSILON = 1e-5  # keeps the scale of a matrix of zeros positive, and fp16 holds it


class TernaryLinear(nn.Linear):
    """``y = W~ x`` with ``W~ = a t``; the latent ``weight`` [out, in] stays float32 and is what is trained."""

    def __init__(self, latent: Tensor) -> None:
        rows, columns = latent.shape
        nn.Module.__init__(self)
        self.in_features, self.out_features = columns, rows
        self.weight = nn.Parameter(latent.detach().clone())
        self.register_parameter("bias", None)

    @torch.no_grad()
    def scale(self) -> Tensor:
        """a = eps + mean |W|, rounded to the fp16 that will be stored, so that training sees what ships."""
        return (EPSILON + self.weight.abs().mean()).half().float()

    @torch.no_grad()
    def trits(self) -> Tensor:
        """t [out, in] in {-1, 0, 1}, float32."""
        return (self.weight / self.scale()).clamp(-1, 1).round()

    def levels(self) -> Tensor:
        """W~ [out, in]; its gradient goes to the latent weight as it is."""
        return _StraightThrough.apply(self.weight, self.trits() * self.scale())  # type: ignore[no-untyped-call, no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.levels())

    def encoded(self) -> Ternary:
        """Packed trits, and the one scale written once a row."""
        codes = (self.trits() + 1).to(torch.uint8)
        return Ternary.from_codes(codes[:, None], 0, Scales.of(self.scale().expand(len(codes), 1), 16))


class _StraightThrough(torch.autograd.Function):
    """The second argument forward, the gradient to the first backward.

    ``w + (q - w).detach()`` is off by a rounding where ``w`` and ``q`` differ in size; what ships must be ``q``.
    """

    @staticmethod
    def forward(ctx: Any, latent: Tensor, levels: Tensor) -> Tensor:  # type: ignore[override]
        return levels.view_as(levels)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None
