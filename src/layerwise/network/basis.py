"""The residual stream in another basis: the same function with the stream turned by an orthogonal matrix Q.

    y = norm(x) diag(g) + b                       a norm that reads the stream, its gain and bias
    writers (tables, output projections, biases)  along the stream's axis:  E <- E Q,   W <- Q^T W,   c <- Q^T c
    readers (what reads y)                        along their input axis:   W <- W diag(g) Q,   g <- 1
    a norm's bias                                 into its readers' biases: c <- c + W b,       b <- 0
                                                  or, where one has none, on the norm:          b <- Q^T (b / g)

A norm without gain commutes with Q: an RMSNorm with every orthogonal one, a LayerNorm with those that keep 1. With
Q = I this is the folding of norms into their readers. Inside an attention the values of a head may be turned as well:

    V_h <- R^T V_h,   O_h <- O_h R                per head h, the same R for all: queries average values of one head

``network/basis_search.py`` finds the parts by trying them; everything here is values. Computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from layerwise.errors import InputError

T = TypeVar("T")
Read = Callable[[str], Tensor]  # parameter -> its values
MOST = 1e4  # of a bias over its gain, times the largest gain: beyond it float32 would lose what it should keep


@dataclass(frozen=True)
class StreamNorm:
    """A norm that reads the stream.

    gain, bias: its parameters; readers: parameter -> the axis along which it reads what the norm gives.
    biases:     reader -> its own bias, for the readers that have one.
    """

    path: str
    gain: str
    bias: str | None
    centres: bool
    readers: Mapping[str, int]
    biases: Mapping[str, str]

    @property
    def takes_bias(self) -> bool:
        """Whether its bias can go to its readers."""
        return self.bias is not None and set(self.biases) == set(self.readers)


@dataclass(frozen=True)
class Heads:
    """Values and output projection of an attention: ``rows`` of ``values`` along ``axis`` come in heads of ``size``."""

    size: int
    values: str
    axis: int
    bias: str | None
    rows: tuple[
        int, int, int
    ]  # start, stop, and of how many heads' widths one is a value's (3 where q, k, v alternate)
    output: str
    output_axis: int


@dataclass(frozen=True)
class BasisStream:
    """Everything that a change of the stream's basis touches. ``shared``: writer -> the head tied to it."""

    width: int
    writers: Mapping[str, int]
    norms: tuple[StreamNorm, ...]
    heads: tuple[Heads, ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict)

    @property
    def keeps_ones(self) -> bool:
        """Whether a LayerNorm reads it, which only rotations that keep 1 commute with."""
        return any(norm.centres for norm in self.norms)

    def below(self, path: str) -> BasisStream:
        """The same with every name below a module's path."""

        def named(values: Mapping[str, T]) -> dict[str, T]:
            return {f"{path}.{name}": value for name, value in values.items()}

        norms = tuple(
            StreamNorm(
                f"{path}.{n.path}", f"{path}.{n.gain}", None if n.bias is None else f"{path}.{n.bias}", n.centres,
                named(n.readers), {r: f"{path}.{b}" for r, b in named(n.biases).items()},
            )
            for n in self.norms
        )  # fmt: skip
        heads = tuple(
            replace(
                h, values=f"{path}.{h.values}", bias=None if h.bias is None else f"{path}.{h.bias}",
                output=f"{path}.{h.output}",
            )
            for h in self.heads
        )  # fmt: skip
        return BasisStream(self.width, named(self.writers), norms, heads)


Changes = dict[str, Callable[[Tensor], Tensor]]


def changes_of(
    stream: BasisStream, read: Read, turn: Tensor | None, heads: Callable[[int], Tensor] | None = None
) -> Changes:
    """Parameter -> what happens to it; ``read`` gives the network's values as they are before.

    turn:  Q ``[width, width]``, or None to fold norms and nothing else.
    heads: size -> R; None leaves the heads alone.
    Raises ``InputError`` for a norm whose bias has no place to go.
    """
    found: Changes = {}
    if turn is not None:
        found |= {name: partial(turned_along, turn=turn, axis=axis) for name, axis in stream.writers.items()}
    for norm in stream.norms:
        for reader, axis in norm.readers.items():
            found[reader] = partial(_read_weight, read=read, norm=norm, axis=axis, turn=turn)
            if norm.takes_bias:
                found[norm.biases[reader]] = partial(_read_bias, read=read, norm=norm, reader=reader, axis=axis)
        found[norm.gain] = torch.ones_like
        if norm.bias is not None:
            check_bias(norm, read)
            found[norm.bias] = (
                torch.zeros_like if norm.takes_bias else partial(_own_bias, read=read, norm=norm, turn=turn)
            )
    for pair in stream.heads if heads is not None else ():
        block = heads(pair.size)  # type: ignore[misc]
        for name, axis in ((pair.values, pair.axis), (pair.bias, 0), (pair.output, pair.output_axis)):
            if name is not None:
                rows = pair.rows if name != pair.output else None
                found[name] = _then(found.get(name), partial(turned_heads, turn=block, axis=axis, rows=rows))
    return found


def turned_along(value: Tensor, turn: Tensor, axis: int) -> Tensor:
    """``value`` with ``axis`` in the new basis, in the type it came in."""
    moved = value.double().movedim(axis, -1) @ turn.to(value.device)
    return moved.movedim(-1, axis).to(value.dtype).contiguous()


def turned_heads(value: Tensor, turn: Tensor, axis: int, rows: tuple[int, int, int] | None) -> Tensor:
    """``value`` with the heads along ``axis`` turned: all of them, or those of ``Heads.rows``."""
    size = len(turn)
    start, stop, every = rows or (0, value.shape[axis], 1)
    moved = value.double().movedim(axis, -1).clone()
    part = moved[..., start:stop]
    heads = part.unflatten(-1, (-1, every, size))[..., -1, :]  # values come last where q, k and v alternate
    part.unflatten(-1, (-1, every, size))[..., -1, :] = heads @ turn.to(value.device)
    return moved.movedim(-1, axis).to(value.dtype).contiguous()


def check_bias(norm: StreamNorm, read: Read) -> None:
    """Raise ``InputError`` where a bias has to stay on its norm and is too large beside its gain for that."""
    if norm.bias is None or norm.takes_bias or read(norm.gain).is_meta:
        return
    gain, bias = read(norm.gain).double(), read(norm.bias).double()
    alive = bias != 0
    if bool((bias[alive].abs() > MOST * gain[alive].abs() / gain.abs().max().clamp(min=1e-30)).any()):
        raise InputError(f"{norm.path} has gains that are almost zero where its bias is not, and a reader without bias")


def _read_weight(value: Tensor, read: Read, norm: StreamNorm, axis: int, turn: Tensor | None) -> Tensor:
    gain = read(norm.gain).double().to(value.device)
    scaled = (value.double().movedim(axis, -1) * gain).movedim(-1, axis)
    return (scaled if turn is None else turned_along(scaled, turn, axis)).to(value.dtype).contiguous()


def _read_bias(value: Tensor, read: Read, norm: StreamNorm, reader: str, axis: int) -> Tensor:
    assert norm.bias is not None
    shift = torch.tensordot(read(reader).double(), read(norm.bias).double(), dims=([axis], [0]))
    return (value.double() + shift.to(value.device)).to(value.dtype)


def _own_bias(value: Tensor, read: Read, norm: StreamNorm, turn: Tensor | None) -> Tensor:
    gain = read(norm.gain).double().to(value.device)
    own = torch.where(value == 0, 0.0, value.double() / torch.where(gain == 0, 1.0, gain))
    return (own if turn is None else turned_along(own, turn, 0)).to(value.dtype)


def _then(first: Callable[[Tensor], Tensor] | None, second: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return second if first is None else lambda value: second(first(value))
