"""Mixture-of-Experts layers, opened into their experts so that every matrix is a linear of its own.

transformers keeps the experts of a layer in two parameters beside the router:

    gate_up [experts, 2 * inner, width]     down [experts, width, inner]

A module that holds exactly these is replaced by a list of experts, each with a ``gate_proj``, an ``up_proj`` and a
``down_proj``, run in a loop over the experts that were sent tokens:

    y_t = sum over t's experts e of  r_te * down_e(act(gate_e x_t) * up_e x_t)

Such modules are found by their parameters, never by a model's name, and are replaced only after both have computed the
same on small random matrices; any other way to mix experts stays as it is, its matrices at 16 bits. The router stays
as it is too: it is small, and an error in it sends tokens elsewhere, which no second-order figure predicts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

TOLERANCE = 1e-5
PROBED_TOKENS, PROBED_WIDTH, PROBED_INNER = 7, 6, 4


class Expert(nn.Module):
    """``down(act(gate x) * up x)`` of the tokens that were sent here.

    tokens: which rows of the layer's input the latest call was given, ``[n]`` int64.
    """

    tokens: Tensor | None = None

    def __init__(self, width: int, inner: int, activation: nn.Module) -> None:
        super().__init__()
        self.gate_proj = empty_linear(inner, width)
        self.up_proj = empty_linear(inner, width)
        self.down_proj = empty_linear(width, inner)
        self.act_fn = activation

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        self.tokens = tokens
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


def empty_linear(rows: int, columns: int) -> nn.Linear:
    return nn.Linear(columns, rows, bias=False, device="meta").requires_grad_(False)


class Experts(nn.ModuleList):
    """The experts of one layer, called as the module that it stands for.

    fused: the names under which that module held ``gate_up`` and ``down``.
    """

    def __init__(self, count: int, width: int, inner: int, activation: nn.Module, fused: tuple[str, str]) -> None:
        super().__init__(Expert(width, inner, activation) for _ in range(count))
        self.width, self.inner, self.fused = width, inner, fused

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[tokens, width]`` from the inputs, and for each token its experts and their shares ``[tokens, k]``."""
        out = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if index >= len(self):  # what a router gives to say "none"
                continue
            tokens, place = torch.where(top_k_index == index)
            mixed = self[index](hidden_states[tokens], tokens) * top_k_weights[tokens, place, None]
            out.index_add_(0, tokens, mixed.to(out.dtype))
        return out

    def slices(self) -> Iterator[tuple[str, int, int, tuple[int, int]]]:
        """(relative parameter, 0 for ``gate_up`` or 1 for ``down``, first element in it, shape) of every matrix."""
        half = self.inner * self.width
        for expert in range(len(self)):
            yield f"{expert}.gate_proj.weight", 0, 2 * expert * half, (self.inner, self.width)
            yield f"{expert}.up_proj.weight", 0, (2 * expert + 1) * half, (self.inner, self.width)
            yield f"{expert}.down_proj.weight", 1, expert * half, (self.width, self.inner)

    def fused_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (len(self), 2 * self.inner, self.width), (len(self), self.width, self.inner)


def fused_names(module: nn.Module) -> tuple[str, str] | None:
    """The names of ``gate_up`` ``[e, 2 i, h]`` and ``down`` ``[e, h, i]`` where a module holds these and no others."""
    own = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
    if len(own) != 2 or any(len(shape) != 3 for shape in own.values()) or not hasattr(module, "act_fn"):
        return None
    for first, second in (tuple(own), tuple(own)[::-1]):
        (e, i, h), (e2, h2, i2) = own[first], own[second]
        if e == e2 and h == h2 and i == 2 * i2:
            return first, second
    return None


def open_experts(network: nn.Module, only: set[str] | None = None) -> dict[str, Experts]:
    """Replace every module of fused experts (on the meta device) whose computation is known; path -> its experts.

    only: leave those at other paths as they are.
    """
    opened: dict[str, Experts] = {}
    known: dict[type, bool] = {}
    for path, member in list(network.named_modules()):
        names = fused_names(member)
        if names is None or not path or (only is not None and path not in only):
            continue
        if type(member) not in known:
            with torch.device("cpu"):  # whatever device the caller builds its network on
                known[type(member)] = computes_alike(member, names)
        if known[type(member)]:
            opened[path] = experts_like(member, names)
            network.set_submodule(path, opened[path])
    return opened


def experts_like(member: nn.Module, names: tuple[str, str]) -> Experts:
    count, width, inner = member._parameters[names[1]].shape  # type: ignore[union-attr]
    return Experts(count, width, inner, member.act_fn, names).train(member.training)  # type: ignore[arg-type]


def experts_of(network: nn.Module) -> dict[str, Experts]:
    """Path -> opened experts."""
    return {path: member for path, member in network.named_modules() if isinstance(member, Experts)}


def is_router(parent: nn.Module, child: nn.Linear) -> bool:
    """Whether a linear scores the experts that lie beside it."""
    return any(child.out_features == experts_in(member) for member in parent.children())


def experts_in(member: nn.Module) -> int:
    """How many experts a module holds, opened or not; 0 for any other module."""
    if isinstance(member, Experts):
        return len(member)
    names = fused_names(member)
    return 0 if names is None else len(member._parameters[names[0]])  # type: ignore[arg-type]


@torch.inference_mode()
def computes_alike(member: nn.Module, names: tuple[str, str]) -> bool:
    """Whether a module of fused experts computes what ``Experts`` does, tried on small matrices."""
    generator = torch.Generator().manual_seed(0)
    count, width, inner = member._parameters[names[1]].shape  # type: ignore[union-attr]
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    fused = [draw(count, 2 * PROBED_INNER, PROBED_WIDTH), draw(count, PROBED_WIDTH, PROBED_INNER)]
    small = copy.copy(member)
    small.__dict__ = {
        k: {width: PROBED_WIDTH, inner: PROBED_INNER, 2 * inner: 2 * PROBED_INNER}.get(v, v)
        if type(v) is int and v != count
        else v
        for k, v in member.__dict__.items()
    }
    small._parameters = {n: nn.Parameter(v, requires_grad=False) for n, v in zip(names, fused, strict=True)}
    opened = experts_like(small, names)
    for name, part, start, shape in opened.slices():
        path, _, leaf = name.rpartition(".")
        piece = fused[part].flatten()[start : start + shape[0] * shape[1]].view(shape)
        opened.get_submodule(path)._parameters[leaf] = nn.Parameter(piece, requires_grad=False)
    chosen = torch.rand(PROBED_TOKENS, count, generator=generator).topk(min(2, count)).indices
    shares = torch.rand(chosen.shape, generator=generator)
    x = draw(PROBED_TOKENS, PROBED_WIDTH)
    forward = getattr(type(member).forward, "__wrapped__", type(member).forward)  # its own, not a device's kernel
    try:
        wanted, got = forward(small, x, chosen, shares), opened(x, chosen, shares)
    except Exception:  # another signature, other attributes: whatever it does, it is not this
        return False
    same_kind = isinstance(wanted, Tensor) and wanted.shape == got.shape
    return same_kind and bool(torch.allclose(wanted, got, rtol=TOLERANCE, atol=TOLERANCE))
