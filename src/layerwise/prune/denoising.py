"""A small denoising U-Net of two sizes, and what it is trained for: to say what noise was put on an image.

    x_t = sqrt(a_t) x + sqrt(1 - a_t) noise,   a_t = cos^2(pi/2 (t + 1) / (T + 1)),   loss = ||noise - net(x_t, t)||^2

         pixels ─ enter ─ down ───────────────────────── skip ──┐
                            └ halved ─ lower ─── skip ──┐       │
                                         └─ middle ─ up[0] ─ doubled ─ up[1] ─ leave ─ noise

An ``Up`` joins what came from below with its skip, mixes, and attends over the places of the image by four linears.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwise.errors import InputError
from layerwise.prune.sparsified import batches_drawn

TIMES = 100  # T
WAVES = 32  # numbers of a time
GROUPS = 4
RATE = 2e-3  # Adam's


class Residual(nn.Module):
    """Two convolutions with the time's vector between them, [b, narrow, h, w] -> [b, wide, h, w]."""

    def __init__(self, narrow: int, wide: int, timed: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, narrow), nn.Conv2d(narrow, wide, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(GROUPS, wide), nn.Conv2d(wide, wide, 3, padding=1)
        self.time = nn.Linear(timed, wide)
        self.short = nn.Identity() if narrow == wide else nn.Conv2d(narrow, wide, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(functional.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.short(x) + self.conv2(functional.silu(self.norm2(y)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """One head over the places of an image; queries, keys, values and output are linears of one width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width)
        self.query, self.key = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.value, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm(x).flatten(2).transpose(1, 2)  # [b, places, width]
        scores = self.query(seen) @ self.key(seen).transpose(1, 2) / math.sqrt(seen.shape[2])
        told = self.out(scores.softmax(2) @ self.value(seen))
        return x + told.transpose(1, 2).view_as(x)  # type: ignore[no-any-return]


class Up(nn.Module):
    """A block of the way up: ``below`` [b, c, h, w] and ``skip`` [b, c', h, w] -> [b, width, h, w]."""

    def __init__(self, below: int, skip: int, width: int, timed: int) -> None:
        super().__init__()
        self.channels, self.width, self.timed = below + skip, width, timed
        self.residual, self.attention = Residual(below + skip, width, timed), Attention(width)

    def forward(self, below: Tensor, skip: Tensor, time: Tensor) -> Tensor:
        return self.attention(self.residual(torch.cat([below, skip], 1), time))  # type: ignore[no-any-return]


class Unet(nn.Module):
    """Noisy images [b, channels, h, w], h and w even, and times [b] int64 -> the noise on them."""

    def __init__(self, channels: int = 1, width: int = 16, timed: int = 32, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.time = nn.Sequential(nn.Linear(WAVES, timed), nn.SiLU(), nn.Linear(timed, timed), nn.SiLU())
            self.enter = nn.Conv2d(channels, width, 3, padding=1)
            self.down = Residual(width, width, timed)
            self.halved = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
            self.lower = Residual(2 * width, 2 * width, timed)
            self.middle = Residual(2 * width, 2 * width, timed)
            self.up = nn.ModuleList(
                [Up(2 * width, 2 * width, 2 * width, timed), Up(2 * width, width, width, timed)]
            )  # fmt: skip
            self.leave = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, noisy: Tensor, times: Tensor) -> Tensor:
        time = self.time(waves(times))
        first = self.down(self.enter(noisy), time)
        second = self.lower(self.halved(first), time)
        x = self.up[0](self.middle(second, time), second, time)
        x = self.up[1](functional.interpolate(x, scale_factor=2.0), first, time)
        return self.leave(x)  # type: ignore[no-any-return]


def waves(times: Tensor) -> Tensor:
    """[b] -> sines and cosines [b, 32]."""
    rates = torch.exp(torch.arange(WAVES // 2) * (-math.log(1000.0) / (WAVES // 2)))
    angles = times[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def kept_signal(times: Tensor) -> Tensor:
    """a_t."""
    return torch.cos(math.pi / 2 * (times + 1) / (TIMES + 1)).square()


def noised(pixels: Tensor, times: Tensor, noise: Tensor) -> Tensor:
    signal = kept_signal(times)[:, None, None, None]
    return signal.sqrt() * pixels + (1 - signal).sqrt() * noise


def check_pixels(pixels: Tensor, owner: str) -> None:
    if pixels.dim() != 4 or pixels.shape[2] % 2 or pixels.shape[3] % 2 or not len(pixels):
        raise InputError(
            f"{owner} takes images [n, channels, height, width] of even height and width, not {list(pixels.shape)}"
        )


def fit_denoiser(
    module: nn.Module,
    pixels: Tensor,
    trained: Iterable[nn.Parameter],
    steps: int,
    seed: int,
    batch: int = 64,
    rate: float = RATE,
    stepped: Callable[[], None] = lambda: None,
) -> None:
    """Adam on ``trained`` alone, at a rate that falls by a cosine; noise and times are drawn by the seed."""
    generator, parameters = torch.Generator().manual_seed(seed), list(trained)
    adam = torch.optim.Adam(parameters, lr=rate, foreach=False)
    for step, drawn in enumerate(batches_drawn(len(pixels), min(batch, len(pixels)), steps, generator)):
        x = pixels[drawn]
        times = torch.randint(0, TIMES, (len(x),), generator=generator)
        noise = torch.randn(x.shape, generator=generator)
        loss = (module(noised(x, times, noise), times) - noise).square().mean()
        for group in adam.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        adam.step()
        stepped()
    for parameter in parameters:
        parameter.grad = None


@torch.inference_mode()
def denoising_error(module: nn.Module, pixels: Tensor, seed: int, first: int = 0, last: int = TIMES) -> float:
    """Mean squared error of the noise at times ``first`` up to ``last``; every image at four times."""
    generator, total, draws = torch.Generator().manual_seed(seed), 0.0, 4
    for _ in range(draws):
        times = torch.randint(first, last, (len(pixels),), generator=generator)
        noise = torch.randn(pixels.shape, generator=generator)
        for part in torch.arange(len(pixels)).split(256):
            seen = module(noised(pixels[part], times[part], noise[part]), times[part])
            total += float((seen - noise[part]).square().mean(dim=(1, 2, 3)).sum())
    return total / (draws * len(pixels))
