"""Batch norm, folded into the linear or convolution before it.

In evaluation a batch norm is an affine map of each channel with fixed statistics:

    y = gamma (W x + b - mu) / sigma + beta,    sigma = sqrt(running_var + eps)
      = W' x + b',      W' = diag(gamma / sigma) W,      b' = beta + (gamma / sigma) (b - mu)

so that the norm disappears and its producer gets a bias. Which producer feeds which norm is not read off names: the
network is run once, the norm whose input is the very tensor that a producer returned is folded, and the fold is kept
if the network's output does not change. A norm without such a producer (before an activation, after a concatenation)
stays where it is and *absorbs* its statistics: ``weight = gamma / sigma``, ``bias = beta - mu gamma / sigma``, mean 0
and variance ``1 - eps``, the same map without buffers of its own.

The products are formed in float64 and rounded once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.network.skeleton import parameter_owners

TOLERANCE = 1e-4  # of the largest output; a wrong fold changes outputs by their own size
PRODUCERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class FoldedNorms:
    """Paths of the norms that disappeared into their producers, and of those that absorbed their statistics."""

    folded: tuple[str, ...] = ()
    absorbed: tuple[str, ...] = ()


@torch.no_grad()
def fold_batch_norms(module: nn.Module, run: Callable[[nn.Module], Tensor]) -> FoldedNorms:
    """Fold in place and report what was done; ``run(module)`` gives the output that must not change.

    The module is in eval mode. A norm without running statistics normalises by the batch: it is left alone.
    """
    norms = {p: m for p, m in module.named_modules() if isinstance(m, NORMS) and m.running_var is not None}
    if not norms:
        return FoldedNorms()
    producers = _producers(module, run)
    dense = run(module)
    folded: list[str] = []
    for path, norm in norms.items():
        producer = producers.get(path)
        if producer is not None and _fold(module, path, norm, producer, run, dense):
            folded.append(path)
    absorbed = [path for path in norms if path not in folded]
    for path in absorbed:
        _absorb(norms[path])
    return FoldedNorms(tuple(folded), tuple(absorbed))


def remove_norms(module: nn.Module, norms: FoldedNorms) -> None:
    """Give a module of the same class the structure that folding left: no folded norm, neutral absorbed ones.

    Raises ``KeyError`` for a norm that the module does not have.
    """
    found = dict(module.named_modules())
    for path in norms.folded:
        if not isinstance(found.get(path), NORMS):
            raise KeyError(path)
        module.set_submodule(path, nn.Identity())
    for path in norms.absorbed:
        norm = found.get(path)
        if not isinstance(norm, NORMS):
            raise KeyError(path)
        _neutral(norm)
        if norm.weight is None:
            channels = norm.num_features
            norm.weight, norm.bias = (nn.Parameter(torch.zeros(channels), requires_grad=False) for _ in range(2))


def _producers(module: nn.Module, run: Callable[[nn.Module], Tensor]) -> dict[str, nn.Module]:
    """Norm path -> the module that returned the very tensor that it was given; each was called once and is not tied."""
    calls: dict[str, int] = {}
    returned: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensor is held, so that no other gets its address
    fed: dict[str, nn.Module] = {}
    users: dict[int, int] = {}
    single = {names[0] for names in parameter_owners(module).values() if len(names) == 1}

    def note(path: str):  # type: ignore[no-untyped-def]
        def hook(member: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            calls[path] = calls.get(path, 0) + 1
            if isinstance(member, PRODUCERS) and isinstance(output, Tensor):
                returned[id(output)] = (member, output)
            elif isinstance(member, NORMS) and given and id(given[0]) in returned:
                fed[path] = returned[id(given[0])][0]
                users[id(fed[path])] = users.get(id(fed[path]), 0) + 1

        return hook

    with _hooked(module, note):
        run(module)
    paths = {id(member): path for path, member in module.named_modules()}
    return {
        norm: producer
        for norm, producer in fed.items()
        if calls[norm] == 1
        and calls[paths[id(producer)]] == 1
        and users[id(producer)] == 1
        and f"{paths[id(producer)]}.weight" in single
    }


@contextlib.contextmanager
def _hooked(module: nn.Module, note: Callable[[str], Any]) -> Iterator[None]:
    members = [(p, m) for p, m in module.named_modules() if isinstance(m, (*PRODUCERS, *NORMS))]
    handles = [member.register_forward_hook(note(path)) for path, member in members]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """(factor, shift) of each channel, float64: the norm is ``factor * x + shift``."""
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -norm.running_mean.double() * factor
    return factor, shift if norm.bias is None else shift + norm.bias.double()


def _fold(
    module: nn.Module, path: str, norm: nn.Module, producer: Any, run: Callable[[nn.Module], Tensor], dense: Tensor
) -> bool:
    """Fold one norm; undone, with False, if the output changes."""
    factor, shift = _affine(norm)
    if len(factor) != len(producer.weight):
        return False
    weight, bias = producer.weight, producer.bias
    wide = (-1, *[1] * (weight.dim() - 1))
    shift = shift if bias is None else shift + bias.double() * factor
    producer.weight = nn.Parameter((weight.double() * factor.view(wide)).to(weight.dtype), requires_grad=False)
    producer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=False)
    module.set_submodule(path, nn.Identity())
    found = run(module)
    if float((found - dense).abs().max()) <= TOLERANCE * max(1.0, float(dense.abs().max())):
        return True
    producer.weight, producer.bias = weight, bias
    module.set_submodule(path, norm)
    return False


def _absorb(norm: Any) -> None:
    factor, shift = _affine(norm)
    dtype = norm.running_var.dtype
    norm.weight = nn.Parameter(factor.to(dtype), requires_grad=False)
    norm.bias = nn.Parameter(shift.to(dtype), requires_grad=False)
    _neutral(norm)


def _neutral(norm: Any) -> None:
    """Mean 0 and variance ``1 - eps``, kept out of the state: the norm is ``weight * x + bias``."""
    norm.running_mean = torch.zeros_like(norm.running_mean)
    norm.running_var = torch.full_like(norm.running_var, 1 - norm.eps)
    norm._non_persistent_buffers_set |= {"running_mean", "running_var", "num_batches_tracked"}
