"""Tiny networks that read images, and images to run them on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class TinyResNet(nn.Module):
    """A stem, a residual block with a strided shortcut, a norm that no convolution feeds, a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 3, padding="same", bias=True), nn.BatchNorm2d(12)
        self.shortcut = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
        self.late = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn0(self.stem(x)))
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        x = self.late(self.relu(y + self.shortcut(x)))
        return self.head(functional.gelu(self.depthwise(x)).mean((2, 3)))


def tiny_resnet(seed: int = 3) -> TinyResNet:
    """Random weights, and running statistics of random images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = TinyResNet()
        with torch.no_grad():
            for member in module.modules():
                if isinstance(member, nn.BatchNorm2d):
                    member.weight.uniform_(0.5, 2.0)
                    member.bias.normal_()
                    member.running_mean.normal_()  # type: ignore[union-attr]
                    member.running_var.uniform_(0.3, 3.0)  # type: ignore[union-attr]
            module.head.weight.mul_(4)
    return module.eval()


def tiny_mlp(seed: int = 4) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(40, 96), nn.ReLU(inplace=True), nn.Linear(96, 4)).eval()


def random_inputs(count: int, *shape: int, seed: int = 5) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
