"""Weights that are normal distributions: N(mu, sigma^2) each, sigma = softplus(rho), zero where a mask is false.

    y = W_mu x + sqrt(W_sigma^2 x^2 + 1e-8) eps,   eps standard normal           drawn per output, not per weight
    KL(q | N(0, s^2)) = sum log(s / sigma) + (sigma^2 + mu^2) / (2 s^2) - 1/2     over the weights that are there
    E|w| = mu erf(mu / (sigma sqrt 2)) + sigma sqrt(2 / pi) exp(-mu^2 / (2 sigma^2))
    SNR(|w|) = E|w| / sqrt(mu^2 + sigma^2 - E|w|^2)

SNR(|w|) is an increasing function of |mu| / sigma alone: 1.3236 at zero, about |mu| / sigma where that is large.
Weights are therefore ranked by |mu| / sigma, which is well defined where the formula's difference underflows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

NOISE_FLOOR = 1e-8  # variance of an output, so that its root has a gradient


def mean_size(mu: Tensor, sigma: Tensor) -> Tensor:
    """E|w|."""
    there = sigma * math.sqrt(2 / math.pi) * torch.exp(-mu.square() / (2 * sigma.square()))
    return mu * torch.erf(mu / (sigma * math.sqrt(2))) + there


def size_over_noise(mu: Tensor, sigma: Tensor) -> Tensor:
    """SNR(|w|), by its formula."""
    size = mean_size(mu, sigma)
    return size / (mu.square() + sigma.square() - size.square()).sqrt()


def divergence(mu: Tensor, sigma: Tensor, prior: float) -> Tensor:
    """KL of each weight from N(0, prior^2), in nats."""
    return torch.log(prior / sigma) + (sigma.square() + mu.square()) / (2 * prior**2) - 0.5


def inverse_softplus(value: Tensor) -> Tensor:
    """rho of which ``value`` > 0 is the softplus."""
    return value + torch.log(-torch.expm1(-value))


class Gaussian(nn.Module):
    """A linear or convolution whose weights are drawn anew for every output; ``layer`` holds mu and the bias."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, mask: Tensor, rho: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        self.layer, self.generator = layer, generator
        self.rho = nn.Parameter(rho)
        self.mask: Tensor
        self.register_buffer("mask", mask)

    @property
    def sigma(self) -> Tensor:
        return functional.softplus(self.rho) * self.mask

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.layer(x), self.product(x.square(), self.sigma.square())
        noise = torch.randn(mean.shape, generator=self.generator)
        return mean + (variance + NOISE_FLOOR).sqrt() * noise  # type: ignore[no-any-return]

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Conv2d):
            return self.layer._conv_forward(x, weight, None)
        return functional.linear(x, weight)


def put(module: nn.Module, path: str, member: nn.Module) -> None:
    """Set the submodule at a path."""
    parent, _, child = path.rpartition(".")
    module.get_submodule(parent)._modules[child] = member
