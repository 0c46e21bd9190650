"""Packed modules as torch operators, so that ``torch.compile`` and ``torch.export`` trace them as one node each.

An operator's arguments are tensors and numbers; which module it is of is a number, looked up when it runs. So a traced
graph follows a module whose stored tensors change, and holds none of them.

    layerwise::packed_product(x, module, rows)            x W^T, [..., columns] -> [..., rows]
    layerwise::packed_gradient(gradient, module, columns) g W,   [..., rows] -> [..., columns]
    layerwise::packed_rows(index, module, columns, like)  rows of W, [...] int64 -> [..., columns] of ``like``'s type
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from layerwise.encoding.encoded import Encoded


class Product(Protocol):
    """What the operators ask of a module."""

    encoded: Encoded

    def product(self, x: Tensor) -> Tensor: ...

    def look_up(self, index: Tensor) -> Tensor: ...


_modules: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def register(module: Any) -> int:
    """A number for ``module`` that no other has had."""
    number = next(_numbers)
    _modules[number] = module
    return number


def module_of(number: int) -> Product:
    found = _modules.get(number)
    if found is None:
        raise RuntimeError("the packed module that this graph was traced from is gone; keep it, or trace again")
    return found  # type: ignore[no-any-return]


@torch.library.custom_op("layerwise::packed_product", mutates_args=())
def packed_product(x: Tensor, module: int, rows: int) -> Tensor:
    return module_of(module).product(x.detach()).clone(memory_format=torch.contiguous_format)


@packed_product.register_fake
def _(x: Tensor, module: int, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("layerwise::packed_gradient", mutates_args=())
def packed_gradient(gradient: Tensor, module: int, columns: int) -> Tensor:
    weight = module_of(module).encoded.decode().to(gradient)
    return gradient.detach() @ weight


@packed_gradient.register_fake
def _(gradient: Tensor, module: int, columns: int) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], columns)


def _keep(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
    ctx.module, ctx.columns = inputs[1], inputs[0].shape[-1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return packed_gradient(gradient, ctx.module, ctx.columns), None, None


packed_product.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("layerwise::packed_rows", mutates_args=())
def packed_rows(index: Tensor, module: int, columns: int, like: Tensor) -> Tensor:
    return module_of(module).look_up(index).to(like.dtype)


@packed_rows.register_fake
def _(index: Tensor, module: int, columns: int, like: Tensor) -> Tensor:
    return like.new_empty(*index.shape, columns)
