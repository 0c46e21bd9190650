"""What an encoder's block computes, found by its parts and by running it, never by its name.

A block fits when its parts are six packed linears, two layer norms and one exact GELU, when a run calls them in the
order of a transformer block, and when the library's own block then gives what the block itself gave for random inputs,
with a mask and without. Which of the first three linears is query, key and value is tried out.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.kernels.encoder import Norm, PackedBlock, head_fits
from layerwise.kernels.matrix import PackedMatrix
from layerwise.network.packed import Packed, PackedLinear

MASK = "attention_mask"
SIZES = (2, 7)  # sequences and tokens of a trial
TOLERANCE = 1e-4  # of the largest output: another formula is off by more, float32 arithmetic by a hundredth of it
WITHOUT_EFFECT = (nn.Dropout, nn.Identity)  # in evaluation


class Unfit(Exception):
    """Why a block is not computed by the library, as a clause."""


@dataclass(frozen=True)
class BlockStructure:
    """Paths inside a block: of query, key, value, out, up and down, and of the norms, in the order of their use."""

    linears: tuple[str, ...]
    norms: tuple[str, str]
    heads: int
    norms_first: bool


def structure_of(block: nn.Module, config: Any) -> BlockStructure:
    """Raises ``Unfit``. ``config`` says how many heads there are and which attention is chosen."""
    linears, norms = _parts(block)
    width = linears[0][1].in_features
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    if not head_fits(width, heads):
        raise Unfit(f"its heads are not of 32, 64, 96 or 128 features ({heads} heads, width {width})")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(*SIZES, width, generator=g)
    seen = torch.ones(SIZES[0], 1, SIZES[1], SIZES[1], dtype=torch.bool)
    seen[1, ..., 4:] = False
    names = {id(module): name for name, module in (*linears, *norms)}
    with evaluated(block), torch.no_grad():
        order, whole = _run(block, x, None, config, names)
        own = [name for name in order if name in dict(linears)]
        kinds = "".join("L" if name in dict(linears) else "N" for name in order)
        if kinds not in ("LLLLNLLN", "NLLLLNLL"):
            raise Unfit("its linears and norms are not called in the order of a transformer block")
        masked = _run(block, x, seen, config, names)[1] if _takes_mask(block) else None
        first, second = (name for name in order if name in dict(norms))
        for three in itertools.permutations(own[:3]):
            found = BlockStructure((*three, *own[3:]), (first, second), heads, kinds[0] == "N")
            made = packed_block(block, found)
            if _same(made.run(x, int8=False), whole) and (
                masked is None or _same(made.run(x, seen, int8=False)[:, :4], masked[:, :4])
            ):
                return found
    raise Unfit("it gives other values than query, key, value, output, up, exact GELU and down do with its norms")


def packed_block(block: nn.Module, structure: BlockStructure) -> PackedBlock:
    """The block's present matrices and vectors for the library. Raises ``Unfit``."""
    matrices: list[PackedMatrix] = []
    biases: list[Tensor | None] = []
    for name in structure.linears:
        module = block.get_submodule(name)
        kernel = module.kernel() if isinstance(module, PackedLinear) else None
        if not isinstance(kernel, PackedMatrix) or kernel.table or module.input_spec is not None:
            raise Unfit(f"the form of its {name} has no product with int8 activations of one matrix")
        matrices.append(kernel)
        biases.append(module.bias)
    norms = []
    for name in structure.norms:
        norm: nn.LayerNorm = block.get_submodule(name)  # type: ignore[assignment]
        norms.append(Norm(norm.weight, norm.bias, norm.eps))
    dim = matrices[0].columns // structure.heads
    try:
        return PackedBlock(
            tuple(matrices), tuple(biases), (norms[0], norms[1]), structure.heads,
            scale=dim**-0.5, norms_first=structure.norms_first,
        )  # fmt: skip
    except ValueError as wrong:
        raise Unfit(str(wrong)) from None


Named = list[tuple[str, nn.Module]]


def _parts(block: nn.Module) -> tuple[list[tuple[str, PackedLinear]], Named]:
    """The six linears and two norms of ``block``; raises ``Unfit`` where there is more or less to it."""
    linears = [(name, m) for name, m in block.named_modules() if isinstance(m, PackedLinear)]
    norms: Named = [(name, m) for name, m in block.named_modules() if type(m) is nn.LayerNorm]
    dense = [name for name, m in block.named_modules() if isinstance(m, nn.Linear)]
    if dense:
        raise Unfit(f"its {dense[0]} is not packed")
    if (len(linears), len(norms)) != (6, 2):
        raise Unfit(f"it has {len(linears)} packed linears and {len(norms)} layer norms, not 6 and 2")
    known = {id(m) for _, m in (*linears, *norms)}
    for name, module in block.named_modules():
        direct = [*module._parameters.values(), *module._buffers.values()]
        if id(module) not in known and any(t is not None for t in direct):
            raise Unfit(f"it has parameters of its own in {name or 'itself'}")
    if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in block.parameters()):
        raise Unfit("its biases and norms are not float32 on the CPU")
    if any(m.weight is None for _, m in norms):
        raise Unfit("its norms have no weights")
    leaves = [m for m in block.modules() if id(m) not in known and not list(m.children())]
    acts = [m for m in leaves if not isinstance(m, WITHOUT_EFFECT)]
    if len(acts) != 1 or not _is_gelu(acts[0]):
        raise Unfit("its activation is not one module that computes the exact GELU")
    return linears, norms


def _is_gelu(module: nn.Module) -> bool:
    x = torch.linspace(-8, 8, 1001)
    try:
        found = module(x)
    except Exception:  # a module of any kind: what fails is no activation
        return False
    return isinstance(found, Tensor) and bool(torch.allclose(found, nn.functional.gelu(x), atol=2e-6))


def _takes_mask(block: nn.Module) -> bool:
    return MASK in inspect.signature(block.forward).parameters


def _run(
    block: nn.Module, x: Tensor, seen: Tensor | None, config: Any, names: dict[int, str]
) -> tuple[list[str], Tensor]:
    """The names of the parts in the order of their calls, and the output."""
    order: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda own, _: order.append(names[id(own)]))
        for module in block.modules()
        if id(module) in names
    ]
    given = {}
    if seen is not None:
        eager = getattr(config, "_attn_implementation", None) == "eager"
        given[MASK] = torch.zeros(seen.shape).masked_fill(~seen, float("-inf")) if eager else seen
    try:
        out = block(x, **given)
    except Exception as failed:  # whatever a block of another kind raises
        raise Unfit(f"it does not run on hidden states alone ({type(failed).__name__})") from None
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(out, Tensor) or out.shape != x.shape:
        raise Unfit("it returns something else than hidden states")
    return order, out


@contextmanager
def evaluated(block: nn.Module) -> Iterator[None]:
    """The block in evaluation, its products from exact activations."""
    training = [(m, m.training) for m in block.modules()]
    rounded = [(m, m.int8_activations) for m in block.modules() if isinstance(m, Packed)]
    try:
        block.eval()
        for module, _ in rounded:
            module.int8_activations = False
        yield
    finally:
        for own, was in training:
            own.training = was
        for module, was in rounded:
            module.int8_activations = was


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max())
