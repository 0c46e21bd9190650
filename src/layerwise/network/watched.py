"""What something was made of, and whether it still is that: modules in their places, tensors and their contents."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
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
        self._parts = [(m._modules, name) for m in every for name in m._modules]
        self._modules = [own[name] for own, name in self._parts]
        owners: list[dict[str, Any]] = [own for m in every for own in (m._parameters, m._buffers)]
        self._slots = [(own, name) for own in owners for name in own]
        self._held = [own[name] for own, name in self._slots]
        self._parameters = [held for held in self._held if isinstance(held, nn.Parameter)]
        self._places = [parameter.data_ptr() for parameter in self._parameters]
        known = set(map(id, self._parameters))
        stored = [held for held in self._held if isinstance(held, torch.Tensor) and id(held) not in known]
        self._stored = [tensor for tensor in stored if not tensor.is_inference()]
        self._versions = [tensor._version for tensor in self._stored]
        self._hooks = [own for m in every if id(m) not in outer for own in (m._forward_hooks, m._forward_pre_hooks)]

    def same_modules(self) -> bool:
        """Whether every module is in its place."""
        return all(map(is_, [own.get(name) for own, name in self._parts], self._modules))

    def same_tensors(self) -> bool:
        """Whether every tensor is in its place, and no buffer was written to since.

        Parameters may have been written to where they lie: they are read as they are.
        """
        return (
            all(map(is_, [own.get(name) for own, name in self._slots], self._held))
            and [tensor._version for tensor in self._stored] == self._versions
            and [parameter.data_ptr() for parameter in self._parameters] == self._places
        )

    def hooked(self) -> bool:
        """Whether somebody wants to see what goes through one of them."""
        return any(self._hooks)

    def wants_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self._parameters)
