"""Small drawn images: a bright bar in one of three places, with noise."""

from __future__ import annotations

import torch

from layerwise.nas._space import Space
from layerwise.nas.task import Labelled, Task, divided

TINY = Space(1, 8, 4, 3, (16, 32), (1, 2), (1, 2))


def bars(count: int, seed: int = 0, noise: float = 0.3) -> Labelled:
    """Images ``[n, 1, 8, 8]``: class 0 a bar at the left, 1 at the right, 2 at the top."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    pixels = torch.randn(count, 1, 8, 8, generator=generator) * noise
    for number, label in enumerate(labels.tolist()):
        place = int(torch.randint(0, 3, (1,), generator=generator))
        if label == 2:
            pixels[number, 0, place, :] += 1
        else:
            pixels[number, 0, :, place + 5 * label] += 1
    return Labelled(pixels, labels)


def tiny_task(steps: int = 12, seed: int = 0, limit: float = 0.6, space: Space = TINY, count: int = 120) -> Task:
    train, valid = divided(bars(count), 0)
    return Task(space, train, valid, steps=steps, batch=8, limit=limit, seed=seed)
