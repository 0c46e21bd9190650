"""What something was made of, and whether it still is that: modules in their places, tensors and their contents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class Watched:
    """Some modules and all that is in them, as they are now.

    inside: hooks on the modules themselves, which see what goes in and out of them, do not count.
    """

    def __init__(self, modules: Iterable[nn.Module], inside: bool = False) -> None:
        modules = list(modules)
        outer = set(map(id, modules)) if inside else set()
        every = list({id(part): part for module in modules for part in module.modules()}.values())
        self._parts = [(m._modules, name, part) for m in every for name, part in m._modules.items()]
        owners: list[dict[str, Any]] = [own for m in every for own in (m._parameters, m._buffers)]
        self._held = [(own, name, tensor) for own in owners for name, tensor in own.items()]
        tensors = [t for _, _, t in self._held if t is not None]
        self._versions = [(t, t._version) for t in tensors if not t.is_inference()]
        self._places = [(t, t.data_ptr()) for t in tensors]
        self._hooks = [own for m in every if id(m) not in outer for own in _hooks(m)]
        self._parameters = [t for t in tensors if isinstance(t, nn.Parameter)]

    def unchanged(self) -> bool:
        """Whether every module and tensor is in its place and no tensor was written to since."""
        return (
            all(own.get(name) is part for own, name, part in self._parts)
            and all(own.get(name) is tensor for own, name, tensor in self._held)
            and all(tensor._version == version for tensor, version in self._versions)
            and all(tensor.data_ptr() == place for tensor, place in self._places)
        )

    def hooked(self) -> bool:
        """Whether somebody wants to see what goes through one of them."""
        return any(self._hooks)

    def wants_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self._parameters)


def _hooks(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    return module._forward_hooks, module._forward_pre_hooks
