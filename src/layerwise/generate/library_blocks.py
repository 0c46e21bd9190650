"""Which blocks of a causal network the compiled library runs, found by their parts and by running them.

A block fits when it has seven packed linears and two norms, calls them in the order of a LLaMA's, and when the library
then gives what the block itself gives for random hidden states: five positions of two texts at once, then one more of
each, at different places. Which of three linears is query, key and value, and which of two is the gate, is tried out.
Nothing is read off names, and what does not fit is left to torch, block by block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerwise.kernels.decoder import Block, Decoding, Head, PackedDecoder, Shape, takes
from layerwise.kernels.encoder import Norm
from layerwise.kernels.library import chosen_path
from layerwise.kernels.matrix import DOT_PATH, PANEL_TOKENS, PackedMatrix
from layerwise.network.block_structure import TOLERANCE, WITHOUT_EFFECT, Unfit, evaluated
from layerwise.network.packed import Packed, PackedHead, PackedLinear, kernel_takes
from layerwise.network.watched import Watched

if TYPE_CHECKING:
    from layerwise.generate.network import CausalNetwork

ORDER = "NLLLLNLLL"  # of a block's norms and linears
ROWS, FIRST = 2, 5  # texts of a trial, and positions of its first pass
STARTS = (FIRST, FIRST - 2)  # of its second


@dataclass(frozen=True)
class Layout:
    """Paths inside a block, linears in the order of ``kernels.decoder.LINEARS``."""

    linears: tuple[str, ...]
    norms: tuple[str, str]


class LibraryBlocks:
    """What of a network the library runs.

    places:  block -> its place among those that the library runs.
    left:    the others -> why they are torch's, a clause.
    """

    def __init__(self, network: CausalNetwork) -> None:
        self.network = network
        self.left: dict[int, str] = {}
        self.places: dict[int, int] = {}
        self.decoder: PackedDecoder | None = None
        self._linears: list[Packed] = []
        self._attention = _attention_of(network)
        self._find()
        table = getattr(network.head, "table", None)
        tables = [table] if isinstance(table, nn.Module) else []
        self._watched = Watched([*network.blocks, network.norm, network.head, *tables])

    def __deepcopy__(self, _: dict[int, Any]) -> None:
        """A copy of the network finds its own."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def _find(self) -> None:
        network = self.network
        if chosen_path() is None:
            self.left = dict.fromkeys(range(len(network.blocks)), "the compiled kernels are absent or turned off")
            return
        blocks: list[Block] = []
        shape, layout = None, None
        for index in range(len(network.blocks)):
            try:
                layout, shape, block = _fitting(network, index, layout, shape)
            except Unfit as why:
                self.left[index] = str(why)
                continue
            self.places[index] = len(blocks)
            blocks.append(block)
            self._linears += [network.blocks[index].get_submodule(name) for name in layout.linears]  # type: ignore[misc]
        if shape is None:
            return
        head = _head_of(network, shape)
        if head is not None:
            owner = network.head.table if isinstance(network.head, PackedHead) else network.head
            self._linears.append(owner)  # type: ignore[arg-type]
        self.decoder = PackedDecoder(shape, blocks, head)

    def present(self) -> bool:
        """Whether the network is still what it was."""
        return self._watched.unchanged()

    def int8(self) -> bool | None:
        """Whether inputs of products are rounded to int8; None where that is not the same for all."""
        found = {linear.int8_activations for linear in self._linears}
        return found.pop() if len(found) == 1 else None

    def takes(self, hidden: Tensor, int8: bool) -> bool:
        """Whether the library is for these hidden states now."""
        assert self.decoder is not None
        if not takes(hidden, self.decoder.shape.width) or not kernel_takes(hidden):
            return False
        path = chosen_path()
        if path is None or (not int8 and path != DOT_PATH and hidden.numel() >= PANEL_TOKENS * hidden.shape[2]):
            return False  # many tokens of exact activations are multiplied by panels there
        if self._attention != _attention_of(self.network) or self.network.module.training:
            return False
        return not self._watched.hooked() and not self._watched.wants_gradient()

    def runs(self, blocks: Iterable[int]) -> Iterator[tuple[range | None, int]]:
        """``blocks`` cut into runs: places of blocks that the library runs one behind the other, or None and a block."""
        run: range | None = None
        for index in blocks:
            place = self.places.get(index)
            if run is not None and place != run.stop:
                yield run, index
                run = None
            if place is None:
                yield None, index
            else:
                run = range(place if run is None else run.start, place + 1)
        if run is not None:
            yield run, -1


def _attention_of(network: CausalNetwork) -> Any:
    return getattr(network.module.config, "_attn_implementation", None)


# ---------------------------------------------------------------- one block


def _fitting(
    network: CausalNetwork, index: int, known: Layout | None, shape: Shape | None
) -> tuple[Layout, Shape, Block]:
    """The block for the library; raises ``Unfit``. ``known`` is tried first, ``shape`` must be its own."""
    module = network.blocks[index]
    linears, norms = _parts(module)
    trial = _Trial(network, index, {**linears, **norms})
    if trial.order != ORDER:
        raise Unfit("its linears and norms are not called in the order of a decoder's block")
    own = [name for name in trial.called if name in linears]
    first, second = (name for name in trial.called if name in norms)
    layouts = [
        Layout((*three, own[3], *two, own[6]), (first, second))
        for three in itertools.permutations(own[:3])
        for two in itertools.permutations(own[4:6])
    ]
    layouts.sort(key=lambda layout: layout != known)
    for layout in layouts:
        block = _block(module, layout, norms, network.windows[index])
        found = _shape(network, block, norms[first][1])
        if found is None or (shape is not None and found != shape):
            continue
        try:
            decoder = PackedDecoder(found, [block])
        except ValueError as wrong:
            raise Unfit(str(wrong)) from None
        if trial.same(decoder):
            return layout, found, block
    raise Unfit("it gives other values than a decoder's block of rotary attention and a gate of SiLU does")


Norms = dict[str, tuple[Norm, bool]]


def _parts(block: nn.Module) -> tuple[dict[str, PackedLinear], Norms]:
    """The seven linears and two norms of ``block``; raises ``Unfit`` where there is more or less to it."""
    linears = {name: m for name, m in block.named_modules() if isinstance(m, PackedLinear)}
    dense = [name for name, m in block.named_modules() if isinstance(m, nn.Linear)]
    if dense:
        raise Unfit(f"its {dense[0]} is not packed")
    norms: Norms = {}
    for name, module in block.named_modules():
        direct = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        if isinstance(module, PackedLinear) or not direct:
            continue
        norm = norm_of(module)
        if norm is None:
            raise Unfit(f"it has parameters of its own in {name or 'itself'}")
        norms[name] = norm
    if (len(linears), len(norms)) != (7, 2):
        raise Unfit(f"it has {len(linears)} packed linears and {len(norms)} norms, not 7 and 2")
    if len({centred for _, centred in norms.values()}) != 1:
        raise Unfit("its norms are of two kinds")
    if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in block.parameters()):
        raise Unfit("its biases and norms are not float32 on the CPU")
    return linears, norms


def norm_of(module: nn.Module) -> tuple[Norm, bool] | None:
    """A norm of hidden states, and whether it takes the mean off; None where the module computes something else."""
    parameters = [t for t in module._parameters.values() if t is not None]
    if list(module.children()) or any(t is not None for t in module._buffers.values()) or not 1 <= len(parameters) <= 2:
        return None
    if any(t.dim() != 1 or t.dtype != torch.float32 or t.device.type != "cpu" for t in parameters):
        return None
    weight, shift = parameters[0].detach(), parameters[1].detach() if len(parameters) == 2 else None
    width = len(weight)
    if shift is not None and len(shift) != width:
        return None
    # A small row, in which the number under the root counts, and a usual one.
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3], [2.0]]) + 1e-3
    try:
        with torch.no_grad():
            given = module(x)
    except Exception:  # a module of any kind: what fails is no norm
        return None
    small = {v for v in vars(module).values() if isinstance(v, float) and 0 < v < 1e-2}
    for epsilon, centred in itertools.product(sorted(small), (False, True)):
        y = x - x.mean(-1, keepdim=True) if centred else x
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + epsilon) * weight
        y = y if shift is None else y + shift
        if isinstance(given, Tensor) and given.shape == y.shape and torch.allclose(given, y, rtol=1e-5, atol=1e-5):
            return Norm(parameters[0], parameters[1] if shift is not None else None, epsilon), centred
    return None


def _block(module: nn.Module, layout: Layout, norms: Norms, window: int | None) -> Block:
    linears: list[PackedLinear] = [module.get_submodule(name) for name in layout.linears]  # type: ignore[misc]
    matrices = tuple(_matrix(name, own) for name, own in zip(layout.linears, linears, strict=True))
    first, second = (norms[name][0] for name in layout.norms)
    return Block(matrices, tuple(own.bias for own in linears), (first, second), window)


def _matrix(name: str, module: Packed) -> PackedMatrix:
    kernel = module.kernel()
    if not isinstance(kernel, PackedMatrix) or getattr(module, "input_spec", None) is not None:
        raise Unfit(f"the form of its {name} has no product of one packed matrix")
    return kernel


def _shape(network: CausalNetwork, block: Block, centred: bool) -> Shape | None:
    """What the matrices say, with the number of heads; None where they do not follow one another."""
    heads = int(getattr(network.module.config, "num_attention_heads", 0) or 0)
    query, key, value, out, gate, up, down = block.matrices
    dim, rest = divmod(query.rows, max(heads, 1))
    if not heads or rest or key.rows % dim or key.rows != value.rows or out.columns != query.rows:
        return None
    if gate.rows != up.rows or down.columns != gate.rows:
        return None
    return Shape(query.columns, heads, key.rows // dim, dim, dim**-0.5, centred)


class _Trial:
    """What a block itself gives in two passes over a cache, from exact activations."""

    def __init__(self, network: CausalNetwork, index: int, parts: dict[str, Any]) -> None:
        from layerwise.generate.session import Session

        block = network.blocks[index]
        width = next(m.in_features for m in block.modules() if isinstance(m, PackedLinear))
        g = torch.Generator().manual_seed(0)
        self.given = [torch.randn(ROWS, FIRST, width, generator=g), torch.randn(ROWS, 1, width, generator=g)]
        names = {id(block.get_submodule(name)): name for name in parts}
        self.called: list[str] = []
        if network.longest <= FIRST or network.slots != len(network.blocks):
            raise Unfit("it runs over too few positions, or several times")
        self.session = Session(network, ROWS, FIRST + 1, by_library=False)
        watching = [
            module.register_forward_pre_hook(lambda own, _: self.called.append(names[id(own)]))
            for module in block.modules()
            if id(module) in names
        ]
        self.expected: list[Tensor] = []
        try:
            with evaluated(block), torch.inference_mode():
                for x, starts in zip(self.given, ((0,) * ROWS, STARTS), strict=True):
                    self.expected.append(self.session.run(x, (index,), starts))
                    if len(self.expected) == 1:
                        for hook in watching:
                            hook.remove()
                if self.session.cache.stores[index] is None:
                    raise Unfit("it keeps no keys and values in its own place")
        except Unfit:
            raise
        except Exception as failed:  # whatever a block of another kind raises
            raise Unfit(f"it does not run by itself ({type(failed).__name__})") from None
        finally:
            for hook in watching:
                hook.remove()
        linears = {name for name, part in parts.items() if isinstance(part, PackedLinear)}
        self.order = "".join("L" if name in linears else "N" for name in self.called)

    def same(self, decoder: PackedDecoder) -> bool:
        shape = decoder.shape
        keys, values = torch.zeros(2, ROWS, shape.groups, FIRST + 1, shape.dim)
        try:
            decoding = decoder.over([keys], [values], self.session.turns(self.given[0]))
        except ValueError as wrong:
            raise Unfit(str(wrong)) from None
        found = [
            decoding.run(x, range(1), starts, int8=False)
            for x, starts in zip(self.given, ((0,) * ROWS, STARTS), strict=True)
        ]
        pairs = zip(found, self.expected, strict=True)
        return all(bool((a - b).abs().max() <= TOLERANCE * b.abs().max()) for a, b in pairs)


# ---------------------------------------------------------------- norm and head


def _head_of(network: CausalNetwork, shape: Shape) -> Head | None:
    """The last norm and the head, where the library has a product for it; None leaves both to torch."""
    module = network.head
    norm = norm_of(network.norm)
    if norm is None or norm[1] != shape.centred or len(norm[0].weight) != shape.width:
        return None
    if isinstance(module, PackedHead) and module.table.scale is None:
        owner: Packed = module.table
        bias = module.bias if module.bias_owner is None else module.bias_owner.bias
    elif isinstance(module, PackedLinear):
        owner, bias = module, module.bias
    else:
        return None
    try:
        return Head(norm[0], _matrix("head", owner), bias)  # type: ignore[arg-type]
    except Unfit:
        return None
