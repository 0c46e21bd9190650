"""Grids for the inputs of a linear: what a network multiplies when its activations are integers too.

    x ~ x' = scale * (codes - zero),      y = x' W^T

=========  ==================================  =================================  ==============================
form       scale and zero                      when they are known                stored beside the weight
=========  ==================================  =================================  ==============================
``token``  one scale for each token, no zero   when the token is seen (dynamic)   nothing
``group``  a scale and a zero for each of k    beforehand, from measured ranges   ``input_scale`` fp32 [k],
           groups of channels                  (static)                           ``input_zero`` uint8 [k],
                                                                                  ``input_group`` uint8 [columns]
=========  ==================================  =================================  ==============================

``Quantized.values`` is what is multiplied until kernels take codes; ``input_product.py`` has what a kernel must give.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerwise.encoding.encoded import Layout
from layerwise.encoding.integer import check_tensors
from layerwise.errors import InputError, nearest

MOST_GROUPS = 256  # a channel's group is one byte
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Quantized:
    """Inputs ``[..., columns]`` as integers.

    codes: whole numbers in float32, ``[..., columns]``.
    scale: ``[..., 1]`` for one a token, ``[columns]`` for one a channel.
    zero:  of the shape of ``scale``, or None for a grid around zero.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None

    def values(self) -> Tensor:
        """``scale * (codes - zero)``, float32; never beyond the largest float."""
        centred = self.codes if self.zero is None else self.codes - self.zero
        limit = torch.finfo(torch.float32).max
        return (centred * self.scale).clamp(-limit, limit)


class InputGrid(ABC):
    """How the inputs of one linear become integers. Immutable; tokens never see one another."""

    form: ClassVar[str]
    bits: int

    @abstractmethod
    def quantize(self, x: Tensor) -> Quantized:
        """The codes of ``x`` ``[..., columns]``."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """JSON values that, with the tensors, restore the grid."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Suffix of ``<site>.input`` -> stored tensor; empty where everything is read off the inputs."""

    def rounded(self, x: Tensor) -> Tensor:
        """``x`` as it is multiplied, in its own dtype."""
        return self.quantize(x).values().to(x.dtype)


@dataclass(frozen=True)
class TokenGrid(InputGrid):
    """Symmetric integers with one scale a token: ``scale = max |x| / top``, ``top = 2^(bits - 1) - 1``."""

    form: ClassVar[str] = "token"
    bits: int

    def scale(self, x: Tensor) -> Tensor:
        """``[..., 1]``; a token of zeros has scale 1."""
        largest = x.float().abs().amax(-1, keepdim=True)
        top = 2 ** (self.bits - 1) - 1
        return torch.where(largest > 0, (largest / top).clamp(min=SMALLEST_SCALE), 1.0)

    def quantize(self, x: Tensor) -> Quantized:
        return self.on(x, self.scale(x))

    def on(self, x: Tensor, scale: Tensor) -> Quantized:
        """The codes under given scales."""
        top = 2 ** (self.bits - 1) - 1
        return Quantized((x.float() / scale).round().clamp(-top, top), scale)

    def spec(self) -> dict[str, Any]:
        return {"form": self.form, "bits": self.bits}

    def tensors(self) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True, eq=False)
class GroupGrid(InputGrid):
    """Integers ``0 .. 2^bits - 1`` with a measured scale and zero for each group of channels.

    scale: float32 ``[groups]``;  zero: uint8 ``[groups]``;  group: uint8 ``[columns]``, the group of each channel.
    """

    form: ClassVar[str] = "group"
    bits: int
    group_scale: Tensor
    group_zero: Tensor
    group: Tensor

    @staticmethod
    def between(low: Tensor, high: Tensor, group: Tensor, bits: int) -> GroupGrid:
        """The grid of groups with ranges ``[low, high]``, widened to hold zero."""
        low, high = low.float().clamp(max=0), high.float().clamp(min=0)
        top = 2**bits - 1
        # Divided before they are subtracted: the width of a range may not be a float where its ends are.
        scale = high / top - low / top
        scale = torch.where(scale > 0, scale.clamp(min=SMALLEST_SCALE), 1.0)
        zero = (-low / scale).round().clamp(0, top)
        return GroupGrid(bits, scale, zero.to(torch.uint8), group.to(torch.uint8))

    def quantize(self, x: Tensor) -> Quantized:
        index = self.group.to(x.device).long()
        scale, zero = self.group_scale.to(x.device)[index], self.group_zero.to(x.device)[index].float()
        codes = ((x.float() / scale).round() + zero).clamp(0, 2**self.bits - 1)
        return Quantized(codes, scale, zero)

    def clipped(self, x: Tensor) -> float:
        """Share of the values that lie beyond the ranges, by more than half a step."""
        codes = (x.float() / self.group_scale[self.group.long()]).round() + self.group_zero[self.group.long()].float()
        return float(((codes < 0) | (codes > 2**self.bits - 1)).float().mean())

    def spec(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "bits": self.bits,
            "columns": len(self.group),
            "groups": len(self.group_scale),
        }

    def tensors(self) -> dict[str, Tensor]:
        return {"_scale": self.group_scale, "_zero": self.group_zero, "_group": self.group}


def group_layout(columns: int, groups: int) -> Layout:
    """Suffix of ``<site>.input`` -> (dtype, shape)."""
    return {
        "_scale": (torch.float32, (groups,)),
        "_zero": (torch.uint8, (groups,)),
        "_group": (torch.uint8, (columns,)),
    }


# ---------------------------------------------------------------- what a file says


def input_layout(spec: Mapping[str, Any]) -> Layout:
    """What a grid stores, from its spec alone; ``InputError`` for a spec that no grid writes."""
    form, bits = spec.get("form"), spec.get("bits")
    if form not in ("token", "group"):
        raise InputError(f"there is no grid for inputs named {form!r}{nearest(str(form), ['token', 'group'])}")
    if type(bits) is not int or not 2 <= bits <= 8:
        raise InputError(f"inputs are quantized to 2 to 8 bits, not {bits!r}")
    if form == "token":
        return {}
    columns, groups = spec.get("columns"), spec.get("groups")
    if type(columns) is not int or columns < 1 or type(groups) is not int or not 1 <= groups <= MOST_GROUPS:
        raise InputError(f"grouped inputs need columns and 1 to {MOST_GROUPS} groups, not {columns!r} and {groups!r}")
    return group_layout(columns, groups)


def restore_inputs(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> InputGrid:
    """The grid that ``spec`` and ``tensors`` describe; ``InputError`` on any misfit."""
    layout = input_layout(spec)
    check_tensors(layout, tensors)
    if not layout:
        return TokenGrid(spec["bits"])
    scale, zero, group = tensors["_scale"], tensors["_zero"], tensors["_group"]
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise InputError("the scales of quantized inputs must be positive and finite")
    if int(zero.max()) >= 2 ** spec["bits"] or int(group.max()) >= len(scale):
        raise InputError("the zeros or groups of quantized inputs lie outside what their bits and groups allow")
    return GroupGrid(spec["bits"], scale, zero, group)
