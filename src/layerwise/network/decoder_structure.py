"""What a decoder's block computes, found by its parts and by running it, never by its name.

    h = x + out(heads(norm(x))),   y = h + down(silu(gate(norm(h))) up(norm(h)))

A block fits when its parts are seven packed linears and two norms, or four (those of queries and keys, head by head),
when a run calls them in the order of a LLaMA's or a Qwen3's, and when the library's own block then gives what the block
itself gave for random hidden states, a causal mask and angles of its own. Which of three linears is query, key and
value, and which of two is the gate, is tried out.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.kernels.decoder import Block, PackedDecoder, Shape
from layerwise.kernels.encoder import Norm
from layerwise.kernels.matrix import PackedMatrix
from layerwise.network.block_structure import MASK, TOLERANCE, Unfit, evaluated
from layerwise.network.packed import Packed, PackedLinear

# Of a block's norms and linears: a LLaMA's, and with norms of heads right behind their linears.
ORDERS = ("NLLLLNLLL", "NLNLNLLNLLL")
SIZES = (2, 7)  # texts and tokens of a trial


@dataclass(frozen=True)
class DecoderStructure:
    """Paths inside a block, linears in the order of ``kernels.decoder.LINEARS``, and the shape that its matrices have.

    norms:  of both halves, and where there are any of the queries' and the keys' heads.
    turned: how many features of a head are turned by their position.
    """

    linears: tuple[str, ...]
    norms: tuple[str, ...]
    shape: Shape
    turned: int


def decoder_structure_of(block: nn.Module, config: Any, known: DecoderStructure | None = None) -> DecoderStructure:
    """Raises ``Unfit``. ``config`` says how many heads there are; ``known``, another block's, is tried first."""
    linears, norms = _parts(block)
    trial = _Trial(block, config, linears, norms)
    own = [name for name in trial.called if name in linears]
    used = [name for name in trial.called if name in norms]
    kept = (used[0], used[-1], *used[1:-1])
    if len({norms[name][1] for name in kept[:2]}) != 1 or any(norms[name][1] for name in kept[2:]):
        raise Unfit("its norms are of two kinds")
    orders = [
        (*q, own[3], *g, own[6]) for q in itertools.permutations(own[:3]) for g in itertools.permutations(own[4:6])
    ]
    orders.sort(key=lambda order: known is None or order != known.linears)
    for order in orders:
        shape = _shape(config, [linears[name] for name in order], norms[kept[0]][1])
        if shape is None or (shape.dim, shape.heads) != (trial.dim, trial.heads):
            continue
        found = DecoderStructure(order, kept, shape, trial.turned)
        try:
            decoder = PackedDecoder(shape, [packed_decoder_block(block, found)])
        except ValueError as wrong:
            raise Unfit(str(wrong)) from None
        if trial.same(decoder):
            return found
    raise Unfit("it gives other values than a decoder's block of rotary attention and a gate of SiLU does")


def packed_decoder_block(block: nn.Module, structure: DecoderStructure, window: int | None = None) -> Block:
    """The block's present matrices and vectors for the library. Raises ``Unfit``."""
    linears: list[PackedLinear] = [block.get_submodule(name) for name in structure.linears]  # type: ignore[misc]
    matrices = tuple(matrix_of(name, own) for name, own in zip(structure.linears, linears, strict=True))
    found = [norm_of(block.get_submodule(name)) for name in structure.norms]
    norms = [norm[0] for norm in found if norm is not None]
    if len(norms) != len(found):
        raise Unfit("its norms are no norms any more")
    heads = (norms[2], norms[3]) if len(norms) == 4 else None
    return Block(matrices, tuple(own.bias for own in linears), (norms[0], norms[1]), window, heads)


def matrix_of(name: str, module: Packed) -> PackedMatrix:
    """A packed module's matrix for the library. Raises ``Unfit``."""
    kernel = module.kernel()
    if not isinstance(kernel, PackedMatrix) or getattr(module, "input_spec", None) is not None:
        raise Unfit(f"the form of its {name} has no product of one packed matrix")
    return kernel


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
    if len(linears) != 7 or len(norms) not in (2, 4):
        raise Unfit(f"it has {len(linears)} packed linears and {len(norms)} norms, not 7 and 2 or 4")
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


def _shape(config: Any, linears: list[PackedLinear], centred: bool) -> Shape | None:
    """What the matrices say, with the number of heads; None where they do not follow one another."""
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    query, key, value, out, gate, up, down = linears
    dim, rest = divmod(query.out_features, max(heads, 1))
    if not heads or rest or key.out_features % dim or key.out_features != value.out_features:
        return None
    if (out.in_features, gate.out_features, down.in_features) != (
        query.out_features,
        up.out_features,
        gate.out_features,
    ):
        return None
    return Shape(query.in_features, heads, key.out_features // dim, dim, dim**-0.5, centred)


class _Trial:
    """What a block itself gives for whole texts, from exact activations, and in which order it calls its parts."""

    def __init__(self, block: nn.Module, config: Any, linears: dict[str, PackedLinear], norms: Norms) -> None:
        first = next(iter(linears.values()))
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(*SIZES, first.in_features, generator=g)
        self.heads = int(getattr(config, "num_attention_heads", 0) or 0)
        given = getattr(config, "head_dim", None) or first.in_features // max(self.heads, 1)
        self.dim = int(given)
        self.turned = int(self.dim * _turned_part(config)) // 2 * 2
        angles = torch.rand(SIZES[1], self.turned // 2, generator=g) * 6
        both = torch.cat([angles, angles], -1)
        self.turns = both.cos(), both.sin()
        names = {id(block.get_submodule(name)): name for name in (*linears, *norms)}
        self.called: list[str] = []
        hooks = [
            module.register_forward_pre_hook(lambda own, _: self.called.append(names[id(own)]))
            for module in block.modules()
            if id(module) in names
        ]
        seen = torch.ones(SIZES[1], SIZES[1], dtype=torch.bool).tril()[None, None]
        mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf")) if _adds_masks(config) else seen
        try:
            with evaluated(block), torch.no_grad():
                out = block(
                    self.x, **{MASK: mask}, position_ids=torch.arange(SIZES[1])[None],
                    position_embeddings=(self.turns[0][None], self.turns[1][None]), past_key_values=None,
                )  # fmt: skip
        except Exception as failed:  # whatever a block of another kind raises
            raise Unfit(f"it does not run by itself ({type(failed).__name__})") from None
        finally:
            for hook in hooks:
                hook.remove()
        self.expected: Tensor = out[0] if isinstance(out, tuple) else out
        if "".join("L" if name in linears else "N" for name in self.called) not in ORDERS:
            raise Unfit("its linears and norms are not called in the order of a decoder's block")
        if not isinstance(self.expected, Tensor) or self.expected.shape != self.x.shape:
            raise Unfit("it returns something else than hidden states")

    def same(self, decoder: PackedDecoder) -> bool:
        shape = decoder.shape
        keys, values = torch.zeros(2, SIZES[0], shape.groups, SIZES[1], shape.dim)
        try:
            decoding = decoder.over([keys], [values], self.turns)
        except ValueError as wrong:
            raise Unfit(str(wrong)) from None
        found = decoding.run(self.x, range(1), [0] * SIZES[0], int8=False)
        return bool((found - self.expected).abs().max() <= TOLERANCE * self.expected.abs().max())


def _adds_masks(config: Any) -> bool:
    return getattr(config, "_attn_implementation", None) == "eager"


def _turned_part(config: Any) -> float:
    """The part of a head's features that rotary tables turn."""
    rope: Any = getattr(config, "rope_parameters", None) or {}
    given = rope.get("partial_rotary_factor") if isinstance(rope, dict) else None
    return float(given or getattr(config, "partial_rotary_factor", None) or 1.0)
