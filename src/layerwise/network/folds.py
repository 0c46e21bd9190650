"""Where a factor per channel can be moved from one matrix into its producer without changing the function.

    producer ─ y ─→ consumers          W' = W diag(s) on every consumer,  y' = y / s in the producer

The producer is a norm (its weight and bias are divided) or a linear (its rows and bias are divided). Whether the move
is exact depends on what lies between and on who else reads ``y`` (a residual path, a nonlinearity, shared heads), so
it is not read off module names: every possible fold is tried with random factors, and kept if the block's output
does not change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.network.experts import Expert
from layerwise.network.rotary_pairs import RotaryPairs
from layerwise.network.sites import is_linear, is_transposed

TOLERANCE = 1e-4  # of the block's own change to the hidden state, in float32


@dataclass(frozen=True)
class Fold:
    """``producer``: path of a norm or a linear in the block; ``consumers``: the linears that read its output."""

    producer: str
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class BlockScope:
    """A block as values: its parameters, its linears' statistics, and its exact folds.

    parameters: relative name -> tensor, in the module's own layout.
    transposed: paths of linears whose weight lies ``[in, out]``.
    fit, judge: statistics per linear path.
    rotary:      queries and keys between which a factor a pair of channels can be moved.
    """

    path: str
    parameters: dict[str, Tensor]
    transposed: frozenset[str]
    fit: dict[str, SiteStatistics]
    judge: dict[str, SiteStatistics]
    folds: tuple[Fold, ...]
    rotary: tuple[RotaryPairs, ...] = ()

    def weight(self, linear: str) -> Tensor:
        """``[out, in]``."""
        weight = self.parameters[f"{linear}.weight"]
        return weight.T if linear in self.transposed else weight

    def folded(self, fold: Fold, factor: Tensor) -> BlockScope:
        """The scope with ``factor`` [channels] multiplied into the consumers and divided out of the producer."""
        parameters = fold_parameters(self.parameters, self.transposed, fold, factor)
        fit, judge = dict(self.fit), dict(self.judge)
        for statistics in (fit, judge):
            for consumer in fold.consumers:
                if consumer in statistics:
                    statistics[consumer] = scaled(statistics[consumer], columns=1 / factor)
            if fold.producer in statistics:
                statistics[fold.producer] = scaled(statistics[fold.producer], rows=factor)
        return replace(self, parameters=parameters, fit=fit, judge=judge)


def fold_parameters(
    parameters: dict[str, Tensor], transposed: frozenset[str], fold: Fold, factor: Tensor
) -> dict[str, Tensor]:
    out = dict(parameters)
    for consumer in fold.consumers:
        name = f"{consumer}.weight"
        out[name] = out[name] * (factor[:, None] if consumer in transposed else factor[None, :])
    name = f"{fold.producer}.weight"
    if out[name].dim() == 1 or fold.producer in transposed:
        out[name] = out[name] / factor
    else:
        out[name] = out[name] / factor[:, None]
    bias = f"{fold.producer}.bias"
    if bias in out:
        out[bias] = out[bias] / factor
    return out


def scaled(statistics: SiteStatistics, rows: Tensor | None = None, columns: Tensor | None = None) -> SiteStatistics:
    """Statistics of the same site when its inputs are multiplied by ``columns``, or its gradients by ``rows``."""

    def side(value: Tensor, factor: Tensor | None) -> Tensor:
        if factor is None:
            return value
        return value * factor.square() if value.dim() == 1 else value * factor[:, None] * factor[None, :]

    def at_weights(value: Tensor | None) -> Tensor | None:
        for place, factor in enumerate((rows, columns)):
            if value is not None and factor is not None:
                value = value * factor.abs().unsqueeze(1 - place)
        return value

    uses = tuple(
        replace(
            u,
            rows=side(u.rows, rows),
            columns=side(u.columns, columns),
            inputs=side(u.inputs, columns),
            absolute_mean=u.absolute_mean if columns is None else u.absolute_mean * columns.abs(),
            importance=u.importance and u.importance.over_sides(lambda s: side(s, columns)),
            gradient=at_weights(u.gradient),
            attention=None if u.attention is None else side(u.attention, columns),
            largest=u.largest if columns is None or u.largest is None else u.largest * columns.abs(),
        )
        for u in statistics.uses
    )
    return SiteStatistics(uses)


def find_folds(block: nn.Module, run: Callable[[nn.Module], Tensor], hidden: Tensor, seed: int) -> tuple[Fold, ...]:
    """Exact folds of a materialised block, in the order in which their consumers run; at most one for each input.

    run:    runs the block on ``hidden`` ``[sequences, length, width]`` and returns its output.
    hidden: what ``run`` feeds the block: the change it makes to it is the yardstick of exactness.
    """
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    handles = []
    for path, member in block.named_modules():
        if path and getattr(member, "weight", None) is not None and not list(member.children()):
            handles.append(member.register_forward_hook(_note(path, inputs, outputs)))
    try:
        with torch.inference_mode():
            reference = run(block)
    finally:
        for handle in handles:
            handle.remove()
    change = float((reference - hidden).norm())
    linears = {p: block.get_submodule(p) for p in outputs if is_linear(block.get_submodule(p))}  # in running order
    groups: dict[tuple[int, int], list[str]] = {}  # linears that read the very same tensor
    for path in linears:
        groups.setdefault((inputs[path].data_ptr(), inputs[path].shape[-1]), []).append(path)
    transposed = frozenset(p for p, m in linears.items() if is_transposed(m))
    generator = torch.Generator().manual_seed(seed)
    found: list[Fold] = []
    for consumers in groups.values():
        width = inputs[consumers[0]].shape[-1]
        for producer in _producers(block, linears, consumers, inputs, outputs, width):
            fold = Fold(producer, tuple(consumers))
            factor = (torch.rand(width, generator=generator) * 1.5 + 0.5).to(hidden.device)
            if _is_exact(block, run, fold, factor, transposed, reference, change):
                found.append(fold)
                break
    return tuple(found)


def _note(path: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Callable[..., None]:
    def hook(_: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
            inputs[path], outputs[path] = given[0], output

    return hook


def _producers(
    block: nn.Module,
    linears: dict[str, nn.Module],
    consumers: list[str],
    inputs: dict[str, Tensor],
    outputs: dict[str, Tensor],
    width: int,
) -> list[str]:
    """Norms whose output is the consumers' very input, then linears that ran before and are as wide."""
    given = inputs[consumers[0]].data_ptr()
    norms = [
        p
        for p, y in outputs.items()
        if p not in linears and y.data_ptr() == given and block.get_parameter(f"{p}.weight").shape == (width,)
    ]
    order = list(outputs)
    before = order[: order.index(consumers[0])]
    wide = [p for p in before if p in linears and p not in consumers and outputs[p].shape[-1] == width]
    wide = [p for p in wide if expert_of(block, p) == expert_of(block, consumers[0])]
    return [*norms, *reversed(wide)]


def expert_of(block: nn.Module, path: str) -> str:
    """Path of the expert that a linear belongs to, or nothing: an expert's matrices feed one another and no others."""
    parent = path.rpartition(".")[0]
    return parent if isinstance(block.get_submodule(parent), Expert) else ""


def _is_exact(
    block: nn.Module,
    run: Callable[[nn.Module], Tensor],
    fold: Fold,
    factor: Tensor,
    transposed: frozenset[str],
    reference: Tensor,
    change: float,
) -> bool:
    from layerwise.network.skeleton import materialised

    touched = {*fold.consumers, fold.producer}
    names = [n for n, _ in block.named_parameters() if n.rpartition(".")[0] in touched]
    before = {n: block.get_parameter(n).data for n in names}
    with torch.inference_mode(), materialised(block, fold_parameters(before, transposed, fold, factor)):
        folded = run(block)
    return float((folded - reference).norm()) <= TOLERANCE * change
