"""Simulated devices of federated learning: who has which images, what they report, and how it is put together.

Everything runs in one process. Device k has n_k of the n images and counts as n_k / n.

    pooled mean  m = sum_k n_k/n m_k,   pooled variance  v = sum_k n_k/n (v_k + (m_k - m)^2)

which are mean and variance of all images together where a norm's inputs do not depend on the norms before it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from layerwise.prune.sparsified import batches_drawn, hold, mask_gradients

FEWEST = 2  # images of a device: a batch norm needs two
Statistics = Mapping[str, tuple[Tensor, Tensor]]
Norm = nn.BatchNorm1d | nn.BatchNorm2d


@dataclass(frozen=True)
class Pace:
    """Steps of SGD with momentum that every device takes in a round."""

    steps: int
    batch: int
    rate: float
    momentum: float = 0.9


def divided(labels: Tensor, devices: int, skew: float, seed: int) -> list[Tensor]:
    """Indices of each device's images: every class is shared out in Dirichlet(``skew``) parts.

    The smaller the skew, the fewer classes a device sees. No device is left with fewer than two images.
    """
    generator = np.random.default_rng(seed)
    parts: list[list[int]] = [[] for _ in range(devices)]
    for label in labels.unique().tolist():
        index = generator.permutation(torch.nonzero(labels == label).flatten().numpy())
        cuts = (np.cumsum(generator.dirichlet([skew] * devices))[:-1] * len(index)).round().astype(int)
        for part, piece in zip(parts, np.split(index, cuts), strict=True):
            part += piece.tolist()
    while min(map(len, parts)) < FEWEST:
        min(parts, key=len).append(max(parts, key=len).pop())
    return [torch.tensor(sorted(part)) for part in parts]


def norms_of(module: nn.Module) -> dict[str, Norm]:
    """Batch norms by name."""
    return {name: member for name, member in module.named_modules() if isinstance(member, Norm)}


@torch.no_grad()
def norm_statistics(module: nn.Module, pixels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance [channels] of every batch norm's inputs, norms running on the batch's own; nothing changes."""
    made, found = copy.deepcopy(module).train(), {}

    def seen(name: str):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            over = [d for d in range(given[0].dim()) if d != 1]
            found[name] = (given[0].mean(over), given[0].var(over, unbiased=False))

        return hook

    for name, norm in norms_of(made).items():
        norm.register_forward_pre_hook(seen(name))
    made(pixels)
    return found


def pooled(statistics: Sequence[Statistics], weights: Sequence[float]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of all devices' inputs together, from what each reports."""
    found = {}
    for name in statistics[0]:
        mean = torch.stack([w * s[name][0] for w, s in zip(weights, statistics, strict=True)]).sum(0)
        terms = [w * (s[name][1] + (s[name][0] - mean).square()) for w, s in zip(weights, statistics, strict=True)]
        found[name] = (mean, torch.stack(terms).sum(0))
    return found


@torch.no_grad()
def load_statistics(module: nn.Module, statistics: Statistics) -> None:
    norms = norms_of(module)
    for name, (mean, variance) in statistics.items():
        running_mean, running_var = norms[name].running_mean, norms[name].running_var
        assert running_mean is not None and running_var is not None
        running_mean.copy_(mean)
        running_var.copy_(variance)


class Devices:
    """The devices of one run: their images, and the three things that a server asks of them."""

    def __init__(self, pixels: Tensor, labels: Tensor, parts: Sequence[Tensor], seed: int) -> None:
        self.data = [(pixels[part], labels[part]) for part in parts]
        self.weights = [len(part) / len(pixels) for part in parts]
        self.generator = torch.Generator().manual_seed(seed)

    def restated(self, module: nn.Module, most: int = 64) -> None:
        """Put pooled statistics of at most ``most`` images a device into the batch norms."""
        reports = [norm_statistics(module, x[:most]) for x, _ in self.data]
        load_statistics(module, pooled(reports, self.weights))

    @torch.no_grad()
    def loss(self, module: nn.Module, most: int = 64) -> float:
        """Weighted mean of the devices' own losses, of at most ``most`` images each."""
        module.eval()
        losses = [float(nn.functional.cross_entropy(module(x[:most]), y[:most])) for x, y in self.data]
        return sum(w * loss for w, loss in zip(self.weights, losses, strict=True))

    def train(self, module: nn.Module, masks: Mapping[str, Tensor], pace: Pace) -> None:
        """A round: each device trains from the server's state on its own images; the weighted mean comes back."""
        began = {name: value.clone() for name, value in module.state_dict().items()}
        total = {name: torch.zeros_like(v) for name, v in began.items() if v.is_floating_point()}
        for (x, y), weight in zip(self.data, self.weights, strict=True):
            module.load_state_dict(began)
            module.train()
            sgd = torch.optim.SGD(module.parameters(), lr=pace.rate, momentum=pace.momentum, foreach=False)
            for drawn in batches_drawn(len(x), min(pace.batch, len(x)), pace.steps, self.generator):
                sgd.zero_grad(set_to_none=True)
                nn.functional.cross_entropy(module(x[drawn]), y[drawn]).backward()  # type: ignore[no-untyped-call]
                mask_gradients(module, masks)
                sgd.step()
            for name, value in module.state_dict().items():
                if name in total:
                    total[name].add_(value, alpha=weight)
        module.load_state_dict({**began, **total})
        hold(module, masks)

    def wanted(
        self, module: nn.Module, masks: Mapping[str, Tensor], counts: Mapping[str, int], batch: int
    ) -> dict[str, Tensor]:
        """Weighted mean gradient of the pruned weights, as far as devices send it: each its ``counts`` largest.

        Zero for a weight that no device sent.
        """
        total = {name: torch.zeros(masks[name].shape) for name in counts}
        made = copy.deepcopy(module).train()
        for (x, y), weight in zip(self.data, self.weights, strict=True):
            drawn = torch.randperm(len(x), generator=self.generator)[:batch]
            made.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(made(x[drawn]), y[drawn]).backward()  # type: ignore[no-untyped-call]
            for name, count in counts.items():
                gradient = made.get_parameter(name).grad
                if gradient is None:
                    continue
                pruned = torch.where(masks[name], 0.0, gradient).flatten()
                sent = pruned.abs().argsort(descending=True, stable=True)[:count]
                total[name].view(-1).index_add_(0, sent, pruned[sent], alpha=weight)
        return total
