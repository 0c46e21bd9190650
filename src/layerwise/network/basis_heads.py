"""Finding the attention heads whose values can be turned, by turning them: part of ``network/basis_search.py``.

V_h <- R^T V_h,   O_h <- O_h R      every head h of a reader V and of a writer O; the block must compute the same
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from layerwise.network.basis import BasisStream, Heads, changes_of
from layerwise.network.residual import SAME

EXACT = 10 * SAME * SAME  # of the block's own change, in float32


def find_heads(
    stream: BasisStream,
    parameters: Mapping[str, nn.Parameter],
    size: int | None,
    turn: Callable[[int], Tensor],
    run: Callable[[], Tensor],
    change: float,
) -> tuple[Heads, ...]:
    """Values whose heads can be turned, with the projection that takes it back; none where no pair is exact.

    size: of a head, where it is known. run, change: the block's output, and the length of what it adds.
    """
    out = run()
    readers = {r: axis for norm in stream.norms for r, axis in norm.readers.items()}
    for output, written in stream.writers.items():
        inner = parameters[output]
        if inner.dim() != 2 or size is None or inner.shape[1 - written] % size:
            continue
        for values, axis in readers.items():
            bias = values.removesuffix("weight") + "bias"
            own = bias if bias in parameters and bias != values else None
            for rows in layouts(parameters[values], axis, inner.shape[1 - written], size):
                pair = Heads(size, values, 1 - axis, own, rows, output, 1 - written)
                kept = [(p, p.clone()) for n, p in parameters.items() if n in (values, bias, output)]
                apply(parameters, BasisStream(stream.width, {}, (), (pair,)), None, turn)
                same = (run() - out).norm() <= EXACT * change
                restore(kept)
                if same:
                    return (pair,)
    return ()


def apply(
    parameters: Mapping[str, nn.Parameter],
    stream: BasisStream,
    turn: Tensor | None,
    heads: Callable[[int], Tensor] | None,
) -> None:
    """Change a part's parameters in place; all new values are made from the old ones."""
    before = {n: p.clone() for n, p in parameters.items()}
    for name, change in changes_of(stream, before.__getitem__, turn, heads).items():
        parameters[name].copy_(change(before[name]))


def restore(kept: Iterable[tuple[Tensor, Tensor]]) -> None:
    for parameter, value in kept:
        parameter.copy_(value)


def head_size(module: nn.Module, block: nn.Module) -> int | None:
    """Width of an attention head: what a module of the block says of itself, else what the config says."""
    for member in block.modules():
        for name in ("head_dim", "attention_head_size", "head_size"):
            if isinstance(found := getattr(member, name, None), int):
                return found
    config = getattr(module, "config", None)
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None


def layouts(values: Tensor, axis: int, inner: int, size: int) -> list[tuple[int, int, int]]:
    """Where the values' rows may lie in a reader: all of it, behind queries and keys, or in turns with them."""
    if values.dim() != 2:
        return []
    rows = values.shape[1 - axis]
    found = [(0, rows, 1)] if rows % size == 0 and rows <= inner else []
    behind = (rows - inner) // 2  # queries as wide as the output projection's input, then keys and values
    if behind > 0 and behind % size == 0 and rows == inner + 2 * behind:
        found.append((rows - behind, rows, 1))
    if rows == 3 * inner:
        found.append((0, rows, 3))
    return found
