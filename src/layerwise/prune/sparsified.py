"""What a sparsifier is given and what it gives back: examples, masks, and the bytes of both as they are stored."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from layerwise.encoding.dense import DTYPES
from layerwise.encoding.sparse import Sparse
from layerwise.errors import InputError
from layerwise.network.module import scores

HALF = DTYPES["float16"]
FEWEST = 2  # classes


@dataclass(frozen=True, eq=False)
class Examples:
    """A module in memory and what it is trained on.

    module:  maps ``pixels`` to scores [n, classes]; a denoiser maps noisy pixels and times to noise.
    pixels:  [n, ...] float32.
    labels:  [n] int64, or None where the images are all there is.
    stepped: called after every step.
    """

    module: nn.Module
    pixels: Tensor
    labels: Tensor | None = None
    seed: int = 0
    stepped: Callable[[], None] = lambda: None

    def targets(self, owner: str) -> Tensor:
        """The labels; ``InputError`` where there are none, or they do not fit the images and the module's scores."""
        if self.labels is None:
            raise InputError(f"{owner} trains a classifier; give labels [n] with the images")
        if self.labels.dim() != 1 or self.labels.is_floating_point() or len(self.labels) != len(self.pixels):
            raise InputError(f"labels must be whole numbers [{len(self.pixels)}], one an image")
        if not len(self.labels) or int(self.labels.min()) < 0 or len(self.labels.unique()) < FEWEST:
            raise InputError(f"{owner} trains a classifier; give images of two classes or more, counted from 0")
        classes = scores(copy.deepcopy(self.module).eval(), self.pixels[:FEWEST]).shape[1]
        if int(self.labels.max()) >= classes:
            raise InputError(f"labels reach {int(self.labels.max())}, and the module scores classes 0 to {classes - 1}")
        return self.labels


@dataclass(frozen=True, eq=False)
class Sparsified:
    """A pruned module in eval mode.

    masks:   parameter name -> bool of its shape; false where the weight is zero. Other parameters are dense.
    spreads: parameter name -> standard deviation of each weight, zero where the mask is false; for a network that is
             a distribution of networks.
    figures: what the method says of its own run.
    """

    module: nn.Module
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    spreads: Mapping[str, Tensor] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)

    def stored(self) -> dict[str, Sparse]:
        """The masked weights in form ``sparse``, a convolution's as [out, in * kernel]."""
        parameters = dict(self.module.named_parameters())
        return {
            name: Sparse.from_values(parameters[name].detach().flatten(1), mask.flatten(1), "mask", HALF)
            for name, mask in self.masks.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all values in fp16 and of the masks; a spread has a value for every weight that is kept."""
        kept = sum(2 * int(self.masks[name].sum()) for name in self.spreads)
        dense = sum(2 * p.numel() for n, p in self.module.named_parameters() if n not in self.masks)
        dense += sum(2 * b.numel() for b in self.module.buffers() if b.is_floating_point())
        return kept + dense + sum(form.nbytes for form in self.stored().values())

    def rounded(self) -> Sparsified:
        """As it is stored: every value decoded from its form, in a copy."""
        made = copy.deepcopy(self.module)
        forms = self.stored()
        with torch.no_grad():
            for name, value in [*made.named_parameters(), *made.named_buffers()]:
                if name in forms:
                    value.copy_(forms[name].decode().view_as(value))
                elif value.is_floating_point():
                    value.copy_(value.to(HALF))
        spreads = {name: value.to(HALF).float() for name, value in self.spreads.items()}
        return Sparsified(made, self.masks, spreads, self.figures)

    @torch.inference_mode()
    def chances(self, pixels: Tensor, draws: int = 8, seed: int = 0) -> Tensor:
        """Chance of every class [n, classes]; of a distribution of networks the mean over ``draws`` of them."""
        if not self.spreads:
            return self.module(pixels).softmax(1)
        generator, made = torch.Generator().manual_seed(seed), copy.deepcopy(self.module)
        means = {name: value.detach().clone() for name, value in self.module.named_parameters() if name in self.spreads}
        total: Tensor = torch.zeros(())
        for _ in range(draws):
            for name, mean in means.items():
                noise = torch.randn(mean.shape, generator=generator)
                made.get_parameter(name).copy_(mean + self.spreads[name] * noise)
            total = total + made(pixels).softmax(1)
        return total / draws


def prunable(module: nn.Module, ends: bool, owner: str) -> dict[str, Tensor]:
    """Weights of linears and convolutions by name, in order; without the first and the last one unless ``ends``."""
    found: dict[str, Tensor] = {
        f"{path}.weight": member.weight
        for path, member in module.named_modules()
        if isinstance(member, nn.Linear | nn.Conv2d)
    }
    if not ends:
        found = dict(list(found.items())[1:-1])
    if not found:
        raise InputError(f"{type(module).__name__} has no linear or convolution that {owner} could prune")
    return found


def kept_of(density: float, entries: int) -> int:
    """Entries that a matrix of ``entries`` keeps: one at least."""
    return min(entries, max(1, math.floor(density * entries + 0.5)))


def strongest(score: Tensor, keep: int) -> Tensor:
    """Mask of the ``keep`` largest of a tensor, the first of equals: bool, the same shape."""
    order = score.flatten().argsort(descending=True, stable=True)[:keep]
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[order] = True
    return mask.view(score.shape)


def batches_drawn(images: int, batch: int, steps: int, generator: torch.Generator) -> list[Tensor]:
    """Indices of the images that each step sees: every image once before any comes again."""
    order: list[Tensor] = []
    while sum(map(len, order)) < batch * steps:
        order.append(torch.randperm(images, generator=generator))
    run = torch.cat(order) if order else torch.zeros(0, dtype=torch.int64)
    return [run[i * batch : (i + 1) * batch] for i in range(steps)]


@torch.no_grad()
def hold(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Put the weights that a mask takes out at exactly zero."""
    for name, mask in masks.items():
        parameter = module.get_parameter(name)
        parameter.copy_(torch.where(mask, parameter, 0.0))


def mask_gradients(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zero the gradient of what a mask takes out, so that it stays at zero."""
    for name, mask in masks.items():
        gradient = module.get_parameter(name).grad
        if gradient is not None:
            gradient.mul_(mask)
