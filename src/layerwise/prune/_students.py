"""Students of a chain of layers: which units stay and how wide they are; building, teaching and counting them.

A unit is a convolution or linear of an ``nn.Sequential`` with the batch norm and activation right behind it; the last
linear, which gives the scores, and pooling or flattening stay as they are. A student is a tuple of widths, 0 for a unit
that is gone. A layer inherits its weights where its shape is the teacher's, and is drawn anew otherwise.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwise.errors import InputError
from layerwise.prune.sparsified import batches_drawn

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
FOLLOWS = (*NORMS, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Dropout)
FIXED = (nn.Flatten, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Identity)
FEATURES = 5  # numbers by which a policy knows a layer

Student = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Chain:
    """The teacher's layers in order; ``units`` are the places of the layers that may go or shrink."""

    layers: tuple[nn.Module, ...]
    units: tuple[int, ...]
    shape: tuple[int, ...]  # of one image

    @property
    def teacher(self) -> Student:
        return tuple(_width(self.layers[place]) for place in self.units)

    def features(self, student: Student) -> Tensor:
        """What a policy reads of the units that are there [units, 5]: kind, kernel, stride, padding and width."""
        rows = []
        for place, width in zip(self.units, student, strict=True):
            layer = self.layers[place]
            if isinstance(layer, nn.Conv2d):
                padding = layer.padding[0] if isinstance(layer.padding, tuple) else 0
                rows.append([1.0, layer.kernel_size[0] / 3, float(layer.stride[0]), float(padding), width / 32])
            else:
                rows.append([0.0, 0.0, 0.0, 0.0, width / 32])
        return torch.tensor(rows)

    def built(self, student: Student, seed: int) -> nn.Sequential | None:
        """The student with its first weights, or None where its layers do not fit together."""
        widths, made, gone = dict(zip(self.units, student, strict=True)), [], False
        x = torch.zeros(2, *self.shape)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            for place, layer in enumerate(self.layers):
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    gone = widths.get(place) == 0
                    if gone:
                        continue
                    layer = _resized(layer, x.shape[1], widths.get(place, _width(layer)))
                elif isinstance(layer, FOLLOWS):
                    if gone:
                        continue
                    layer = _renormed(layer, x.shape[1]) if isinstance(layer, NORMS) else copy.deepcopy(layer)
                else:
                    layer = copy.deepcopy(layer)
                try:
                    x = layer.eval()(x)
                except RuntimeError:  # a kernel that is larger than what is left of the image
                    return None
                made.append(layer)
        return nn.Sequential(*made)


def chain_of(module: nn.Module, pixels: Tensor, owner: str) -> Chain:
    """Read a module; ``InputError`` where it is no plain chain of layers that ends in a linear."""
    layers = tuple(module) if isinstance(module, nn.Sequential) else ()
    strange = [type(m).__name__ for m in layers if not isinstance(m, (nn.Conv2d, nn.Linear, *FOLLOWS, *FIXED))]
    grouped = any(isinstance(m, nn.Conv2d) and m.groups != 1 for m in layers)
    if not layers or strange or grouped or not isinstance(layers[-1], nn.Linear):
        what = f"has {strange[0]}" if strange else "has grouped convolutions" if grouped else "is none"
        raise InputError(
            f"{owner} removes layers of an nn.Sequential of convolutions, linears, batch norms, activations and "
            f"pooling that ends in a linear; {type(module).__name__} {what}"
        )
    units = tuple(i for i, m in enumerate(layers[:-1]) if isinstance(m, nn.Conv2d | nn.Linear))
    if not units:
        raise InputError(f"{type(module).__name__} has no layer besides its last, so {owner} has nothing to remove")
    return Chain(layers, units, tuple(pixels.shape[1:]))


def parameters_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def teach(
    student: nn.Module, wanted: Tensor, pixels: Tensor, labels: Tensor, steps: int, rate: float, seed: int
) -> None:
    """Adam on cross-entropy and the squared distance of scores ``wanted`` [n, classes] from the teacher; then eval."""
    student.train()
    adam = torch.optim.Adam(student.parameters(), lr=rate, foreach=False)
    generator = torch.Generator().manual_seed(seed)
    for drawn in batches_drawn(len(pixels), min(64, len(pixels)), steps, generator):
        scores = student(pixels[drawn])
        loss = functional.cross_entropy(scores, labels[drawn]) + functional.mse_loss(scores, wanted[drawn])
        adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    student.eval()


@torch.inference_mode()
def hits(module: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Share of images whose best score is their label's."""
    return float((module(pixels).argmax(1) == labels).float().mean())


def _width(layer: nn.Module) -> int:
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features


def _resized(layer: nn.Conv2d | nn.Linear, wide: int, width: int) -> nn.Module:
    """The layer for so many inputs and outputs; itself where they are what they were."""
    if isinstance(layer, nn.Linear):
        if (wide, width) == (layer.in_features, layer.out_features):
            return copy.deepcopy(layer)
        return nn.Linear(wide, width, bias=layer.bias is not None)
    if (wide, width) == (layer.in_channels, layer.out_channels):
        return copy.deepcopy(layer)
    return nn.Conv2d(
        wide, width, layer.kernel_size, layer.stride, layer.padding, layer.dilation, 1, layer.bias is not None  # type: ignore[arg-type]
    )  # fmt: skip


def _renormed(norm: nn.Module, width: int) -> nn.Module:
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    return copy.deepcopy(norm) if norm.num_features == width else type(norm)(width)
