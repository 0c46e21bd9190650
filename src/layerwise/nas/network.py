"""The networks of a space: one forward for stored, sliced and mixed weights, and what a search leaves behind.

    x = patches + positions;   x += out(attend(norm1 x));   x += down(gelu(up(norm2 x)));   head(mean of norm x)

``Searched`` is a plain module of linears and layer norms with one path, or with several that share their first blocks
and whose class probabilities are averaged: ``log mean_m softmax(z_m)``. It is written as ``model.safetensors`` beside a
``config.json`` of its architecture; ``layerwise.searched(DIR)`` is the module again, and ``layerwise.open`` takes it
with images like any module.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.nas._space import HEAD, Architecture, Shapes, Space, block_macs, macs, shapes
from layerwise.network import safetensors_file

Values = dict[str, Tensor]
FORMAT = "layerwise searched network"
VERSION = 1
EPSILON = 1e-6
POSITIONS = 0.5  # deviation; at the usual 0.02 a short training hardly learns where a patch is


class Parts(Protocol):
    """What a forward pass is made of, by name."""

    def linear(self, name: str, x: Tensor) -> Tensor: ...
    def norm(self, name: str, x: Tensor) -> Tensor: ...
    def value(self, name: str) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class Loose:
    """Tensors by name. ``share`` [width] weighs the channels of a mixed stream in layer norms; None: all alike.

    The mean and variance of a norm are taken with these weights, so a channel of weight 0 is as good as absent.
    """

    values: Mapping[str, Tensor]
    share: Tensor | None = None
    norms: bool = True

    def value(self, name: str) -> Tensor:
        return self.values[name]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.values[f"{name}.weight"], self.values[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        if not self.norms:
            return x
        weight, bias = self.values[f"{name}.weight"], self.values[f"{name}.bias"]
        if self.share is None:
            return F.layer_norm(x, x.shape[-1:], weight, bias, EPSILON)
        weights = self.share / self.share.sum()
        centred = x - (x * weights).sum(-1, keepdim=True)
        variance = (centred.square() * weights).sum(-1, keepdim=True)
        return centred * torch.rsqrt(variance + EPSILON) * weight + bias


def patches_of(pixels: Tensor, patch: int, coarse: int = 1) -> Tensor:
    """Squares of ``patch`` pixels ``[n, squares, channels * patch^2]``; of a coarse grid every ``coarse``-th pixel."""
    size = pixels.shape[-1] // (coarse * patch) * coarse * patch
    found: Tensor = F.unfold(pixels[..., :size, :size], patch, dilation=coarse, stride=coarse * patch)
    return found.transpose(1, 2)


def enter(parts: Parts, space: Space, pixels: Tensor, coarse: int = 1) -> Tensor:
    """Images -> hidden states ``[n, squares, width]``; positions of a coarse grid are means over its squares."""
    x = parts.linear("patch", patches_of(pixels, space.patch, coarse))
    grid = parts.value("positions")
    if coarse > 1:
        square = grid.T.reshape(1, -1, space.grid, space.grid)
        grid = F.avg_pool2d(square, coarse).flatten(2)[0].T
    return x + grid


def block(parts: Parts, index: int, x: Tensor) -> Tensor:
    at, (count, tokens, width) = f"blocks.{index}.", x.shape
    y = parts.norm(at + "norm1", x)
    query, key, value = (
        parts.linear(at + name, y).view(count, tokens, width // HEAD, HEAD).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    # written out: the fused kernel has no derivative along a line, which As-ViT takes
    weights = torch.softmax(query @ key.transpose(2, 3) / math.sqrt(HEAD), -1)
    mixed = (weights @ value).transpose(1, 2).reshape(count, tokens, width)
    x = x + parts.linear(at + "out", mixed)
    return x + feed_forward(parts, index, parts.norm(at + "norm2", x))


def feed_forward(parts: Parts, index: int, y: Tensor) -> Tensor:
    return parts.linear(f"blocks.{index}.down", F.gelu(parts.linear(f"blocks.{index}.up", y)))


def leave(parts: Parts, x: Tensor) -> Tensor:
    return parts.linear("head", parts.norm("norm", x).mean(1))


def forward(parts: Parts, space: Space, depth: int, pixels: Tensor, coarse: int = 1) -> Tensor:
    """Class scores ``[n, classes]`` of the first ``depth`` blocks."""
    x = enter(parts, space, pixels, coarse)
    for index in range(depth):
        x = block(parts, index, x)
    return leave(parts, x)


# ---------------------------------------------------------------- weights


def drawn(of: Shapes, generator: torch.Generator) -> Values:
    """First weights: normal of variance 1 / columns, biases 0, gains 1, positions of deviation 0.5."""
    found: Values = {}
    for name, shape in of.items():
        if ".norm" in name or name.startswith("norm"):
            found[name] = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        elif name.endswith("bias"):
            found[name] = torch.zeros(shape)
        else:
            scale = POSITIONS if name == "positions" else 1 / math.sqrt(shape[1])
            found[name] = torch.randn(shape, generator=generator) * scale
    return found


def sliced(values: Mapping[str, Tensor], of: Shapes) -> Values:
    """The leading part of every tensor; views, so gradients reach the whole."""
    return {name: values[name][tuple(slice(0, size) for size in shape)] for name, shape in of.items()}


# ---------------------------------------------------------------- what is found


@dataclasses.dataclass(frozen=True)
class Shape:
    """One architecture, or members of one width that share their first ``shared`` blocks (and what is before them)."""

    members: tuple[Architecture, ...]
    shared: int = 0

    def __post_init__(self) -> None:
        first = self.members[0]
        for member in self.members:
            if member.width != first.width or member.ratios[: self.shared] != first.ratios[: self.shared]:
                raise InputError("members of an ensemble must have one width and the same shared blocks")
            if not 0 <= self.shared <= member.depth:
                raise InputError("members of an ensemble cannot share more blocks than they have")

    def __str__(self) -> str:
        text = " + ".join(map(str, self.members))
        return text if len(self.members) == 1 else f"{text}, {self.shared} shared"


def stored_shapes(space: Space, shape: Shape) -> Shapes:
    """Names of a ``Searched``: ``trunk.`` before the split, ``branches.M.`` behind it."""
    found: Shapes = {}
    for number, member in enumerate(shape.members):
        for name, size in shapes(space, member).items():
            found[f"{_owner(shape, name, number)}.{name}"] = size
    return found


def count_parameters(space: Space, shape: Shape) -> int:
    return sum(math.prod(size) for size in stored_shapes(space, shape).values())


def count_macs(space: Space, shape: Shape, coarse: int = 1) -> int:
    """Multiply-adds of one image; what members share is computed once."""
    first = shape.members[0]
    tokens = (space.grid // coarse) ** 2
    before = tokens * space.channels * space.patch**2 * first.width
    before += sum(block_macs(tokens, first.width, r) for r in first.ratios[: shape.shared])
    return before + sum(macs(space, member, coarse) - before for member in shape.members)


def _owner(shape: Shape, name: str, number: int) -> str:
    if name == "positions" or name.startswith("patch."):
        return "trunk"
    within = name.startswith("blocks.") and int(name.split(".")[1]) < shape.shared
    return "trunk" if within else f"branches.{number}"


class Searched(nn.Module):
    """The network of a ``Shape`` as plain modules: images ``[n, channels, side, side]`` -> scores ``[n, classes]``."""

    def __init__(self, space: Space, shape: Shape) -> None:
        super().__init__()
        self.space, self.shape = space, shape
        for name, size in stored_shapes(space, shape).items():
            self._place(name, size)

    def _place(self, name: str, size: tuple[int, ...]) -> None:
        path, _, leaf = name.rpartition(".")
        if leaf == "bias":
            return  # comes with its weight
        if leaf == "positions":
            self._holder(path).register_parameter(leaf, nn.Parameter(torch.zeros(size)))
            return
        parent, _, last = path.rpartition(".")
        made = nn.LayerNorm(size, EPSILON) if len(size) == 1 else nn.Linear(size[1], size[0], device="meta")
        if isinstance(made, nn.Linear):  # drawn without the global generator
            made = made.to_empty(device="cpu")
            nn.init.zeros_(made.weight), nn.init.zeros_(made.bias)
        self._holder(parent).add_module(last, made)

    def _holder(self, path: str) -> nn.Module:
        here: nn.Module = self
        for word in path.split("."):
            if word not in here._modules:
                here.add_module(word, nn.Module())
            here = here.get_submodule(word)
        return here

    def member_scores(self, pixels: Tensor, coarse: int = 1) -> list[Tensor]:
        """Scores of every member; the shared blocks run once."""
        trunk = _Modules(self.get_submodule("trunk"))
        x = enter(trunk, self.space, pixels, coarse)
        for index in range(self.shape.shared):
            x = block(trunk, index, x)
        found = []
        for number, member in enumerate(self.shape.members):
            branch, y = _Modules(self.get_submodule(f"branches.{number}")), x
            for index in range(self.shape.shared, member.depth):
                y = block(branch, index, y)
            found.append(leave(branch, y))
        return found

    def forward(self, pixels: Tensor) -> Tensor:
        return averaged(self.member_scores(pixels))

    def fill(self, members: Sequence[Mapping[str, Tensor]]) -> Searched:
        """Copy weights in, a set of the space's names for each member; what is shared comes from the first."""
        for number, values in reversed(list(enumerate(members))):
            for name in shapes(self.space, self.shape.members[number]):
                target = self.get_parameter(f"{_owner(self.shape, name, number)}.{name}")
                target.data.copy_(values[name].detach())
        return self


@dataclasses.dataclass(frozen=True)
class _Modules:
    """The parts of a module tree."""

    tree: nn.Module

    def value(self, name: str) -> Tensor:
        return self.tree.get_parameter(name)

    def linear(self, name: str, x: Tensor) -> Tensor:
        found: Tensor = self.tree.get_submodule(name)(x)
        return found

    norm = linear


def averaged(scores: Sequence[Tensor]) -> Tensor:
    """``log mean_m softmax(z_m)``; the scores themselves where there is one member."""
    if len(scores) == 1:
        return scores[0]
    return torch.logsumexp(torch.stack([s.log_softmax(-1) for s in scores]), 0) - math.log(len(scores))


# ---------------------------------------------------------------- the file


def write_searched(folder: Path, network: Searched, found: Mapping[str, Any]) -> int:
    """Write the weights and ``config.json``; returns bytes of the weights. ``found``: what the search says of it."""
    state = {name: value.detach().contiguous() for name, value in sorted(network.state_dict().items())}
    layout = {name: (value.dtype, tuple(value.shape)) for name, value in state.items()}
    path = folder / "model.safetensors"
    safetensors_file.write(path, layout, iter(state.items()), {"format": "pt"})
    members = [{"width": m.width, "ratios": list(m.ratios)} for m in network.shape.members]
    config = {
        "format": FORMAT, "format_version": VERSION, "space": dataclasses.asdict(network.space),
        "members": members, "shared": network.shape.shared, "search": dict(found),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return path.stat().st_size


def is_searched(folder: str | Path) -> bool:
    """Whether ``layerwise search`` wrote this folder, by its config."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("format") == FORMAT


def load_searched(folder: str | Path) -> Searched:
    """The module that ``layerwise search`` wrote, in eval mode. ``InputError`` for any other folder."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config.get("format") != FORMAT or config.get("format_version") != VERSION:
            raise ValueError("its config.json names another format")
        choices: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config["space"].items()}
        space = Space(**choices)
        members = tuple(Architecture(m["width"], tuple(m["ratios"])) for m in config["members"])
        if not members or not all(m in set(space.architectures()) for m in members):
            raise ValueError("its members are not of its space")
        shape = Shape(members, config["shared"])
        tensors = safetensors_file.read_header(folder / "model.safetensors")[0]
        wanted = stored_shapes(space, shape)
        if {n: tuple(t.shape) for n, t in tensors.items()} != wanted:
            raise ValueError("its tensors are not those of its architecture")
        network = Searched(space, shape)  # nothing of its size is made before the file agrees
        for name in wanted:
            network.get_parameter(name).data.copy_(safetensors_file.read(tensors[name]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as reason:
        raise InputError(f"{folder} holds no network that layerwise search wrote: {reason}") from None
    return network.eval()
