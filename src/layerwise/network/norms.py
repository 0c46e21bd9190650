"""Norms for a residual stream without a mean, and putting them in the place of a module's LayerNorms.

    LayerNorm   (x - mean x) / sqrt(var x + eps) * g + b
    RmsNorm      x / sqrt(mean x^2 + eps) * g + b                      the same where mean x = 0

A vector of d numbers without a mean is described by d - 1. In which way is the ``Basis``:

    drop      the last is left out:  x_d = -(x_1 + … + x_{d-1}),       |x|^2 = sum x_i^2 + (sum x_i)^2
    rotate    coordinates in d - 1 orthonormal directions A, all orthogonal to 1:  |x|^2 = sum x_i^2

and ``CompressedRmsNorm`` divides by ``sqrt(|x|^2 / d + eps)``: by d, not by d - 1.

Artifacts of a rewritten network say under ``"layerwise"`` in config.json which of their norms this holds for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerwise.errors import InputError
from layerwise.network.residual import centre_output

RECORD = "layerwise"  # key of config.json


class RmsNorm(nn.Module):
    """``x / sqrt(mean x^2 + eps) * weight + bias`` over the last axis; torch's own has no bias."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, width: int, eps: float, weight: nn.Parameter | None, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # one kernel there; elsewhere torch takes it step by step, which is three times slower than this
            y = functional.rms_norm(x, (self.width,), self.weight, self.eps)
            return y if self.bias is None else y + self.bias
        return scaled(x * torch.rsqrt(squares(x) / self.width + self.eps), self.weight, self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}, bias={self.bias is not None}"


def squares(x: Tensor) -> Tensor:
    """``sum x^2`` over the last axis, ``[…, 1]``, in one pass and at least in float32."""
    exact = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact).square()


def scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``x * weight + bias``, where there is one."""
    if weight is not None and bias is not None:
        return torch.addcmul(bias.to(x.dtype), x, weight.to(x.dtype))
    y = x if weight is None else x * weight
    return y if bias is None else y + bias


@dataclass(frozen=True)
class Basis:
    """How vectors of ``width`` numbers without a mean are written as ``width - 1``."""

    width: int
    rotates: bool

    def directions(self) -> Tensor:
        """``A`` ``[width, width - 1]`` float64, orthonormal and orthogonal to 1: a reflection of all axes but the last.

        The reflection takes the last axis to 1 / sqrt(width), so what it makes of the others is orthogonal to that.
        """
        unit = torch.full((self.width,), self.width**-0.5, dtype=torch.float64)
        mirror = -unit
        mirror[-1] += 1
        mirror /= mirror.norm()
        return (torch.eye(self.width, dtype=torch.float64) - 2 * mirror[:, None] * mirror[None, :])[:, :-1]

    def written(self, value: Tensor, axis: int) -> Tensor:
        """A writer's values without a mean along ``axis``, in ``width - 1`` coordinates; float64 in and out."""
        if not self.rotates:
            return value.narrow(axis, 0, self.width - 1)
        return (value.movedim(axis, -1) @ self.directions().to(value.device)).movedim(-1, axis)

    def read(self, weight: Tensor, axis: int) -> Tensor:
        """A reader's matrix for inputs in ``width - 1`` coordinates; ``axis`` is that of its inputs."""
        if self.rotates:
            return self.written(weight, axis)
        last = weight.narrow(axis, self.width - 1, 1)
        return weight.narrow(axis, 0, self.width - 1) - last

    def squares(self, x: Tensor) -> Tensor:
        """``|x|^2`` of the vectors, ``[…, 1]``."""
        inside = squares(x)
        return inside if self.rotates else inside + x.sum(-1, keepdim=True, dtype=inside.dtype).square()


class CompressedRmsNorm(nn.Module):
    """``x / sqrt(|x|^2 / d + eps)`` for ``x`` in ``d - 1`` coordinates.

    With ``expands`` its result has all d numbers, times ``weight`` plus ``bias``: for readers that are no linear.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    directions: Tensor | None

    def __init__(
        self,
        basis: Basis,
        eps: float,
        expands: bool = False,
        weight: nn.Parameter | None = None,
        bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.basis, self.eps, self.expands = basis, eps, expands
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        kept = basis.directions().float() if expands and basis.rotates else None
        self.register_buffer("directions", kept, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = x * torch.rsqrt(self.basis.squares(x) / self.basis.width + self.eps)
        if self.expands:
            if self.directions is not None:
                wide = wide @ self.directions.to(wide.dtype).T
            else:
                wide = torch.cat((wide, -wide.sum(-1, keepdim=True)), -1)
        return scaled(wide, self.weight, self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.basis.width} in {self.basis.width - 1}, eps={self.eps}, expands={self.expands}"


class WriteOutput:
    """A forward hook: what the module returns, less its mean, in the coordinates of ``basis``."""

    def __init__(self, basis: Basis) -> None:
        self.basis = basis

    def __call__(self, module: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
        exact = output.double()
        return self.basis.written(exact - exact.mean(-1, keepdim=True), -1).to(output.dtype)


def swap_norms(module: nn.Module, norms: Iterable[str], centred: Iterable[str] = ()) -> nn.Module:
    """Put ``RmsNorm`` in the place of the LayerNorms at ``norms``, in place, with their own parameters.

    centred: modules whose output the stream is, and whose mean is taken off each time they run.
    Raises ``InputError`` where one of the paths is no LayerNorm over the last axis.
    """
    for path in norms:
        norm = _at(module, path)
        if not isinstance(norm, nn.LayerNorm) or len(norm.normalized_shape) != 1:
            raise InputError(f"{path} is a {type(norm).__name__}, not a LayerNorm over features; nothing to swap")
        made = RmsNorm(norm.normalized_shape[0], norm.eps, norm.weight, norm.bias).train(norm.training)
        module.set_submodule(path, made)
    for path in centred:
        _at(module, path).register_forward_hook(centre_output)
    return module


def record_of(rewrite: str, norms: Iterable[str], centred: Iterable[str]) -> dict[str, Any]:
    """What config.json says of a network whose stream has no mean."""
    return {"rewrite": rewrite, "rms_norms": list(norms), "centred": list(centred)}


def swap_recorded(module: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """``swap_norms`` as an artifact's config asks; ``InputError`` where it says nothing of norms."""
    record = config.get(RECORD)
    lists = [record.get(key) if isinstance(record, Mapping) else None for key in ("rms_norms", "centred")]
    if not all(isinstance(paths, list) and all(isinstance(p, str) for p in paths) for paths in lists):
        raise InputError(
            "the artifact was not made with --rewrite pre_rmsnorm, so its norms cannot become RMSNorms; "
            "load it without rms_norms"
        )
    return swap_norms(module, *lists)  # type: ignore[arg-type]


def _at(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise InputError(f"{type(module).__name__} has no module {path}") from None


def untie(module: nn.Module, shared: Mapping[str, str]) -> None:
    """Give every tied reader in ``shared`` (table parameter -> reader's parameter) a matrix of its own, in place."""
    for table, reader in shared.items():
        path, _, leaf = reader.rpartition(".")
        copy = module.get_parameter(table).detach().clone()
        setattr(module.get_submodule(path), leaf, nn.Parameter(copy, requires_grad=False))
    if shared and hasattr(module, "config"):
        module.config.tie_word_embeddings = False  # type: ignore[union-attr]
        module.all_tied_weights_keys = {}  # type: ignore[assignment]
