"""A network's blocks by one call of the compiled library each, where they are what it computes.

The blocks keep their place, their parameters and their type's base class; only ``forward`` is laid over, and asks at
every call whether the library is for it. So ``state_dict``, saving, hooks on the block and ``copy.deepcopy`` are as
before.

    layerwise::encoder_block(x, mask, block)   the operator that ``torch.compile`` traces
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.kernels.encoder import PackedBlock, takes
from layerwise.kernels.library import chosen_path
from layerwise.kernels.matrix import DOT_PATH
from layerwise.network.block_structure import MASK, BlockStructure, Unfit, packed_block, structure_of
from layerwise.network.decoder_structure import decoder_structure_of
from layerwise.network.fused_decoder import FusedDecoder, fused_decoder_class
from layerwise.network.operators import module_of, register
from layerwise.network.packed import PackedLinear, kernel_takes


@dataclass(frozen=True)
class FusedBlocks:
    """Paths of the blocks that the library computes, and of the others with the reason, a clause."""

    fused: tuple[str, ...]
    left: dict[str, str] = field(default_factory=dict)


def use_fused_blocks(network: nn.Module) -> FusedBlocks:
    """Make the library compute the transformer blocks of ``network`` whole, where it can.

    It takes encoders' blocks whose six linears are packed as integer codes: norms behind (BERT and its kin) or in front
    (ViT), exact GELU, heads of 32, 64, 96 or 128 features; and decoders' blocks of seven packed linears with rotary
    attention and a gate of SiLU (``fused_decoder.py``), which run without a cache or over a ``DynamicCache``. What does
    not fit is left to torch and named in the result.
    At every call torch computes what has gradients, trains, is not float32 on the CPU, has a mask that is not of bools
    (choose ``sdpa`` or ``use_short_attention``; a decoder's has none), more than 1024 tokens, other arguments, hooks
    inside the block (such as ``output_attentions`` sets), or many exact activations on a processor without a
    dot-product instruction.

    Products give the bits that the packed linears give; norms, GELU and attention differ from torch's by the rounding
    of float32. Where inputs are rounded to int8 such a difference may move one to the next whole number, as it may
    between two builds of torch. Call it again after linears were replaced. Raises ``InputError`` for a network without
    blocks of packed linears.
    """
    blocks = _blocks(network)
    if not blocks:
        raise InputError(f"{type(network).__name__} has no list of blocks with packed linears")
    fused, left = [], {}
    for path, block in blocks:
        _release(block)
        try:
            if chosen_path() is None:
                raise Unfit("the compiled kernels are absent or turned off")
            if "adapt" in block.__dict__:
                raise Unfit("it runs for some tokens or texts only")
            _lay_over(block, _config(block, network))
        except Unfit as why:
            left[path] = str(why)
            continue
        fused.append(path)
    return FusedBlocks(tuple(fused), left)


def _lay_over(block: nn.Module, config: Any) -> None:
    """Raises ``Unfit``."""
    if "position_embeddings" in inspect.signature(block.forward).parameters:
        block.__dict__["_fused"] = FusedDecoder(decoder_structure_of(block, config), config)
        block.__class__ = fused_decoder_class(type(block))  # type: ignore[arg-type]
        return
    block.__dict__["_fused"] = Fused(structure_of(block, config))
    block.__dict__["_number"] = register(block)
    block.__class__ = fused_class(type(block))  # type: ignore[arg-type]


def release_fused_blocks(network: nn.Module) -> None:
    """Leave the blocks of ``network`` to torch again."""
    for module in network.modules():
        _release(module)


def plain_class(block: nn.Module) -> type[nn.Module]:
    """A block's own class, whatever is laid over it."""
    own = type(block).__bases__[0]
    laid_over = "_fused" in block.__dict__ and type(block) in (fused_class(own), fused_decoder_class(own))
    return own if laid_over else type(block)


def _release(block: nn.Module) -> None:
    own = plain_class(block)
    if own is not type(block):
        block.__class__ = own  # type: ignore[assignment]
        block.__dict__.pop("_number", None)
        del block.__dict__["_fused"]


def _blocks(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The members of the outermost lists of modules that hold packed linears."""
    found: list[tuple[str, nn.Module]] = []
    for path, module in network.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{own}.") for own, _ in found):
            continue
        members = [(f"{path}.{name}" if path else name, m) for name, m in module.named_children()]
        found += [(own, m) for own, m in members if any(isinstance(part, PackedLinear) for part in m.modules())]
    return found


def _config(block: nn.Module, network: nn.Module) -> Any:
    own = (getattr(module, "config", None) for module in (*block.modules(), network))
    return next((config for config in own if getattr(config, "num_attention_heads", None)), None)


class Fused:
    """A block's structure, and its present matrices and vectors for the library."""

    def __init__(self, structure: BlockStructure) -> None:
        self.structure = structure
        self._edges: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []
        self._linears: list[PackedLinear] = []
        self._held: list[tuple[dict[str, Any], str, Tensor | None]] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._made: PackedBlock | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"structure": self.structure}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> Fused:
        return Fused(copy.deepcopy(self.structure, memo))

    def run(self, block: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """What the block gives, or None where torch must say it."""
        if not self._edges:
            self._look(block)
        if any(own.get(name) is not part for own, name, part in self._edges) or _hooked(p for _, _, p in self._edges):
            return None  # parts were replaced, or somebody wants to see what goes through one
        int8 = self._linears[0].int8_activations
        if any(linear.int8_activations != int8 for linear in self._linears):
            return None
        if not int8 and chosen_path() != DOT_PATH:
            return None
        made = self._present(block)
        if made is None or not takes(x, mask, made.width) or (torch.is_grad_enabled() and made.wants_gradient()):
            return None
        return made.run(x, mask, int8=int8)

    def _look(self, block: nn.Module) -> None:
        """Where the block keeps its parts: asking for them by name at every call would take as long as a step."""
        self._edges = [(m._modules, name, part) for m in block.modules() for name, part in m.named_children()]
        self._linears = [block.get_submodule(name) for name in self.structure.linears]  # type: ignore[misc]

    def _present(self, block: nn.Module) -> PackedBlock | None:
        """The block over its present tensors; None where they make none any more."""
        made = self._made
        if (
            made is not None
            and not any(own.get(name) is not tensor for own, name, tensor in self._held)
            and not any(tensor._version != version for tensor, version in self._versions)
            and made.in_place()
        ):
            return made
        try:
            self._made = packed_block(block, self.structure)
        except Unfit:
            self._made = None
            return None
        norms = [block.get_submodule(name) for name in self.structure.norms]
        owners = [own for m in (*self._linears, *norms) for own in (m._parameters, m._buffers)]
        self._held = [(own, name, tensor) for own in owners for name, tensor in own.items()]
        stored = [t for linear in self._linears for t in linear._buffers.values() if t is not None]
        self._versions = [(t, t._version) for t in stored if not t.is_inference()]
        return self._made


def _hooked(modules: Iterable[nn.Module]) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


@cache
def fused_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A block's class whose forward asks the library first."""
    names = list(inspect.signature(cls.forward).parameters)[2:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**kwargs, **dict(zip(("hidden_states", *names), args, strict=False))}
        x, mask = given.pop("hidden_states", None), given.pop(MASK, None)
        if isinstance(x, Tensor) and not self.training and not any(_said(value) for value in given.values()):
            y = None
            if torch.compiler.is_compiling():
                if traceable(self, x, mask):
                    y = encoder_block(x, mask, self._number)
            elif x.device.type == "cpu" and kernel_takes(x):
                y = self._fused.run(self, x, mask)
            if y is not None:
                return y
        return cls.forward(self, *args, **kwargs)

    def reduced(self: Any, protocol: Any) -> Any:
        return _blank, (cls,), dict(self.__dict__)

    def restored(self: Any, state: dict[str, Any]) -> None:
        cls.__setstate__(self, state)  # type: ignore[attr-defined]
        self.__dict__["_number"] = register(self)

    def plain_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return cls.forward(self, *args, **kwargs)

    own = {"forward": forward, "plain_forward": plain_forward, "__reduce_ex__": reduced, "__setstate__": restored}
    return type(f"Fused{cls.__name__}", (cls,), {**own, "__module__": cls.__module__})


def _blank(cls: type[nn.Module]) -> nn.Module:
    made = fused_class(cls)  # type: ignore[arg-type]
    return made.__new__(made)


def _said(value: object) -> bool:
    return value is not None and value is not False


def traceable(block: nn.Module, x: Tensor, mask: Tensor | None) -> bool:
    """Whether a traced graph may have the block as one node, which has no gradient."""
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in block.parameters())):
        return False
    sound = x.dim() == 3 and x.dtype == torch.float32 and x.device.type == "cpu"
    return sound and (mask is None or mask.dtype == torch.bool) and not _hooked(list(block.modules())[1:])


@torch.library.custom_op("layerwise::encoder_block", mutates_args=())
def encoder_block(x: Tensor, mask: Tensor | None, block: int) -> Tensor:
    own: Any = module_of(block)
    y: Tensor | None = own._fused.run(own, x.detach(), mask)
    if y is None:
        y = own.plain_forward(x, **({} if mask is None else {MASK: mask})).clone()
    return y  # type: ignore[return-value]


@encoder_block.register_fake
def _(x: Tensor, mask: Tensor | None, block: int) -> Tensor:
    return x.new_empty(x.shape)
