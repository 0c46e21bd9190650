"""The values of a module, kept and compared: what training must not touch, or must bring out the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def values(module: nn.Module) -> dict[str, Tensor]:
    """A copy of everything in the module's state."""
    return {n: v.detach().clone() for n, v in module.state_dict().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether both hold the same names and, bit for bit, the same values."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
