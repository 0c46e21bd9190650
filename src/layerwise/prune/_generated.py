"""Masks made for every sample: what reads the feature map and the time, and the linears that are multiplied by it.

    u = GAP(concat(below, skip)) + T time                       [b, channels]
    z = relu(W_2 relu(W_1 u)) as a matrix                       [b, width/f, width/f]
    logits = A (z B^T + b_1) + b_2, along both axes             [b, out, in], one pair A, B for each linear
    M = 1 where logits + g > 0                                  g = -log(-log U): P(M = 1) = 1 - exp(-exp(logits))

Forward M is 0 or 1, backward it is the sigmoid of ``logits + g``. In eval mode g is 0. W_2 is zero and b_2 large at
first, so that every mask begins as all ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwise.prune.denoising import Up

HIDDEN = 64


def hard_mask(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """0 or 1, the shape of ``logits``, with the gradient of the sigmoid; no noise without a generator."""
    if generator is not None:
        uniform = torch.rand(logits.shape, generator=generator).clamp(1e-9, 1 - 1e-7)
        logits = logits - torch.log(-torch.log(uniform))
    soft = logits.sigmoid()
    return (logits > 0).to(soft.dtype) - soft.detach() + soft


class Masked(nn.Module):
    """A linear without change, but that each sample's weight is multiplied by its own ``mask`` [b, out, in]."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.mask = layer, torch.ones(1, 1, 1)

    @property
    def weight(self) -> Tensor:
        """W M [b, out, in]: exactly zero where the mask is."""
        return self.layer.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.transpose(1, 2)  # [b, places, out]
        return y if self.layer.bias is None else y + self.layer.bias


class Adapter(nn.Module):
    """z [b, out/f, in/f] -> logits [b, out, in]."""

    def __init__(self, out: int, inner: int, f: int, bias: float, spread: float, generator: torch.Generator) -> None:
        super().__init__()
        self.along_in = nn.Parameter(torch.randn(inner, inner // f, generator=generator) * spread)
        self.in_bias = nn.Parameter(torch.zeros(inner))
        self.along_out = nn.Parameter(torch.randn(out, out // f, generator=generator) * spread)
        self.out_bias = nn.Parameter(torch.full((out, 1), bias))

    def forward(self, z: Tensor) -> Tensor:
        return self.along_out @ (z @ self.along_in.T + self.in_bias) + self.out_bias


class MaskedUp(nn.Module):
    """An ``Up`` whose attention's linears are masked anew for every sample and time."""

    def __init__(self, up: Up, f: int, bias: float, spread: float, reads: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.up, self.side, self.reads, self.generator = up, up.width // f, reads, generator
        self.time = _drawn(up.timed, up.channels, generator)
        self.first = _drawn(up.channels, HIDDEN, generator)
        self.second = _drawn(HIDDEN, self.side**2, generator)
        self.adapters = nn.ModuleDict()
        for name, layer in list(up.attention.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(up.attention, name, Masked(layer))
                self.adapters[name] = Adapter(layer.out_features, layer.in_features, f, bias, spread, generator)

    def own(self) -> list[nn.Parameter]:
        """What is trained: everything but the block itself."""
        return [p for n, p in self.named_parameters() if not n.startswith("up.")]

    def masks(self, below: Tensor, skip: Tensor, time: Tensor) -> dict[str, Tensor]:
        """Name of a linear -> its masks [b, out, in]."""
        u = torch.cat([below, skip], 1).mean((2, 3)) + self.time(time)
        if not self.reads:
            u = torch.ones_like(u)
        z = functional.relu(self.second(functional.relu(self.first(u)))).view(-1, self.side, self.side)
        generator = self.generator if self.training else None
        return {name: hard_mask(adapter(z), generator) for name, adapter in self.adapters.items()}

    def forward(self, below: Tensor, skip: Tensor, time: Tensor) -> Tensor:
        masks = self.masks(below, skip, time)
        for name, mask in masks.items():
            self.linear(name).mask = mask
        made: Tensor = self.up(below, skip, time)
        for name in masks:
            self.linear(name).mask = torch.ones(1, 1, 1)
        return made

    def linear(self, name: str) -> Masked:
        member = self.up.attention.get_submodule(name)
        assert isinstance(member, Masked)
        return member


def _drawn(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear with weights from the generator, as wide as a linear's usual ones."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        bound = inputs**-0.5
        layer.weight.copy_((2 * torch.rand(layer.weight.shape, generator=generator) - 1) * bound)
        layer.bias.zero_()
    return layer
