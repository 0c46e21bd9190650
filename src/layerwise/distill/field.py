"""Radiance fields in a small: networks from points to density and colour, and a lesson of two of them on rays.

point x [3] ─ body ─→ features [f] ─┬─→ u = log density [1]          alpha_i = 1 - exp(-e^u_i delta)
                                    └─→ colour [3] in (0, 1)         w_i = alpha_i prod_{j<i} (1 - alpha_j)

pixel = sum_i w_i c_i          over the points of a ray; what the weights leave of 1 is black
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from layerwise.distill.lesson import Keeper, Lesson, Seen

NAMES = ("features", "density", "colour")
NEAR, FAR = 1.0, 3.0  # of a ray, seen from a distance of 2 from the middle of a scene in [-1, 1]^3


class Field(nn.Module):
    """A body from points to features, and the two heads that all fields share."""

    def __init__(self, features: int, generator: torch.Generator) -> None:
        super().__init__()
        self.density = drawn_linear(features, 1, generator)
        self.colour = drawn_linear(features, 3, generator)

    def features(self, points: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Points [n, 3] -> (features [n, f], log density [n, 1], colour [n, 3])."""
        found = self.features(points)
        return found, self.density(found), self.colour(found).sigmoid()


class GridField(Field):
    """Features are read from a grid of them, between the eight corners around a point: quick, and large."""

    def __init__(self, size: int = 24, features: int = 16, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        super().__init__(features, generator)
        self.grid = nn.Parameter(torch.zeros(1, features, size, size, size))  # space that no ray teaches stays even

    def features(self, points: Tensor) -> Tensor:
        at = points.view(1, 1, 1, -1, 3)
        return nn.functional.grid_sample(self.grid, at, align_corners=True).view(self.grid.shape[1], -1).T


class WaveField(Field):
    """Features come from waves of the coordinates through a perceptron: small, and slow to train on pixels."""

    def __init__(self, width: int = 48, features: int = 16, waves: int = 4, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        super().__init__(features, generator)
        self.waves = waves
        sizes = (3 + 6 * waves, width, width, features)
        self.layers = nn.ModuleList(drawn_linear(a, b, generator) for a, b in itertools.pairwise(sizes))

    def features(self, points: Tensor) -> Tensor:
        angles = [points * (math.pi * 2.0**k) for k in range(self.waves)]
        x = torch.cat([points, *(wave(a) for a in angles for wave in (torch.sin, torch.cos))], -1)
        for layer in self.layers[:-1]:  # type: ignore[index]
            x = layer(x).relu()
        return self.layers[-1](x)  # type: ignore[no-any-return]


def drawn_linear(columns: int, rows: int, generator: torch.Generator) -> nn.Linear:
    """Uniform in +-1 / sqrt(columns), from this generator alone."""
    made = nn.Linear(columns, rows, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) / math.sqrt(columns))
    return made


# ---------------------------------------------------------------- rays


def ray_weights(log_density: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """(weights, alphas) [rays, samples] of the points along rays; the weights sum to ``1 - prod(1 - alpha)``."""
    alpha = 1 - torch.exp(-log_density.clamp(max=15).exp() * step)
    through = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha[:, :-1]], 1), 1)
    return alpha * through, alpha


def points_of(origins: Tensor, directions: Tensor, samples: int) -> tuple[Tensor, float]:
    """(points [rays, samples, 3], distance between them)."""
    step = (FAR - NEAR) / samples
    depth = NEAR + step * (torch.arange(samples) + 0.5)
    return origins[:, None] + depth[None, :, None] * directions[:, None], step


def views(count: int, pixels: int, seed: int) -> tuple[Tensor, Tensor]:
    """(origins, directions) [count * pixels^2, 3] of cameras at drawn places at distance 2, looking at the middle."""
    generator = torch.Generator().manual_seed(seed)
    towards = nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=-1)
    side = nn.functional.normalize(
        torch.linalg.cross(towards, torch.tensor([[0.3, 0.2, 0.93]]).expand(count, 3)), dim=-1
    )
    up = torch.linalg.cross(side, towards)
    at = (torch.arange(pixels) + 0.5) / pixels - 0.5
    y, x = torch.meshgrid(at, at, indexing="ij")
    flat = x.flatten()[None, :, None] * side[:, None] + y.flatten()[None, :, None] * up[:, None]
    directions = nn.functional.normalize(-towards[:, None] + flat, dim=-1)
    return (2 * towards[:, None]).expand_as(directions).reshape(-1, 3), directions.reshape(-1, 3)


def rendered(field: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], points: Tensor, step: float) -> Seen:
    """What a field gives on the points of rays [rays, samples, 3]."""
    features, density, colour = field(points.reshape(-1, 3))
    weights, _ = ray_weights(density.view(points.shape[:2]), step)
    pixels = (weights[..., None] * colour.view(*points.shape[:2], 3)).sum(1)
    return Seen(pixels, (features, density, colour))


# ---------------------------------------------------------------- the lesson


class FieldLesson(Lesson):
    """Two fields on the same rays; what is compared is pixels [rays, 3], by their squared difference."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        rays: tuple[Tensor, Tensor],
        samples: int = 24,
        at_once: int = 128,
        judged: int = 4,
        seed: int = 0,
        stepped: Callable[[], None] = lambda: None,
        keeper: Keeper | None = None,
    ) -> None:
        self.student, self.teacher, self.seed, self.samples = student, teacher, seed, samples
        order = torch.randperm(len(rays[0]), generator=torch.Generator().manual_seed(seed))
        self.rays = [(rays[0][i], rays[1][i]) for i in order.split(at_once)]
        self.judged = min(judged, len(self.rays) - 1)
        self.parts = len(self.rays) - self.judged
        self.stepped, self.keeper = stepped, keeper

    @property
    def names(self) -> tuple[str, ...]:
        return NAMES

    def see(self, module: nn.Module, part: int, without: Collection[int] = ()) -> Seen:
        return rendered(module, *points_of(*self.rays[part], self.samples))

    def mass(self, teacher: Seen) -> Tensor:
        """Half of it where the teacher's points are seen, half evenly: most of space is empty, and must stay so."""
        weights, _ = ray_weights(teacher.states[1].view(-1, self.samples), (FAR - NEAR) / self.samples)
        return (weights + weights.mean()).view(-1, 1)

    def distances(self, teacher: Tensor, student: Tensor) -> Tensor:
        return (teacher - student).square().mean(-1)
