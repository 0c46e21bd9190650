"""A decoder's blocks by one call of the compiled library each, inside a transformers network and over its own cache.

``fused_blocks.py`` lays this over a block whose computation ``decoder_structure.py`` has found. ``layerwise generate``
does not come by here: its sessions run all blocks in one call (``generate/library_blocks.py``).

The library writes keys and values where they stay, so a cache of transformers that grows (``DynamicCache``) is given
tensors that are views of larger ones, with room for what comes next; whoever replaces them gets copies again.
"""

from __future__ import annotations

import copy
import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.kernels.decoder import PackedDecoder, takes
from layerwise.kernels.library import chosen_path
from layerwise.kernels.matrix import DOT_PATH, PANEL_TOKENS
from layerwise.network.block_structure import MASK, Unfit
from layerwise.network.decoder_structure import DecoderStructure, packed_decoder_block
from layerwise.network.packed import PackedLinear, kernel_takes
from layerwise.network.watched import Watched

MOST_TOKENS = 1024  # in one pass: the attention of more is faster by torch's product of matrices
ROOM = 64  # positions beyond those that a cache needs at first; later as many again as it has
ROOM_NAME = "_layerwise_room"
ARGUMENTS = ("hidden_states", MASK, "position_ids", "past_key_values", "use_cache", "position_embeddings")


class FusedDecoder:
    """A block's structure, and its present matrices and vectors for the library."""

    def __init__(self, structure: DecoderStructure, config: Any) -> None:
        self.structure, self.config = structure, config
        self._watched: Watched | None = None
        self._made: PackedDecoder | None = None
        self._linears: list[PackedLinear] = []
        self._place = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"structure": self.structure, "config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedDecoder:
        return FusedDecoder(copy.deepcopy(self.structure, memo), copy.deepcopy(self.config, memo))

    def run(self, block: nn.Module, given: dict[str, Any]) -> Tensor | None:
        """What the block gives for these arguments, or None where torch must say it."""
        x, turns, past = given.get("hidden_states"), given.get("position_embeddings"), given.get("past_key_values")
        if not isinstance(x, Tensor) or given.get(MASK) is not None or not kernel_takes(x):
            return None
        if not takes(x, self.structure.shape.width) or turns is None or not self._turns(turns, x):
            return None
        made = self._present(block)
        if made is None or self._watched is None or self._watched.wants_gradient() or not self._has_product(x):
            return None
        rows, count, _ = x.shape
        layer = None if past is None else _layer_of(past, self._place)
        start = 0 if layer is None or layer.keys is None else layer.get_seq_length()
        if past is not None and layer is None:
            return None
        # Without a mask, torch's own attention is causal for the first tokens of a text, or lets one see all.
        if count > 1 and (start or getattr(self.config, "_attn_implementation", None) in (None, "eager")):
            return None
        if count > MOST_TOKENS:
            return None
        kept = self._room(layer, rows, start, count)
        if kept is None:
            return None
        keys, values = kept
        decoding = made.over([keys], [values], (turns[0][0], turns[1][0]), start)
        y = decoding.run(x, range(1), [start] * rows, int8=self._linears[0].int8_activations)
        if layer is not None:
            layer.keys, layer.values = keys[:, :, : start + count], values[:, :, : start + count]
        return y

    def _present(self, block: nn.Module) -> PackedDecoder | None:
        """The block over its present tensors; None where they make none, where parts were replaced, which may compute
        something else, or where somebody wants to see what goes through one."""
        if self._watched is not None and not self._watched.same_modules():
            return None
        if self._watched is None or not self._watched.same_tensors():
            self._watched = Watched([block], inside=True)
            places: list[Any] = [m.layer_idx for m in block.modules() if hasattr(m, "layer_idx")]
            self._place = places[0] if places else -1
            try:
                self._linears = [block.get_submodule(name) for name in self.structure.linears]  # type: ignore[misc]
                self._made = PackedDecoder(self.structure.shape, [packed_decoder_block(block, self.structure)])
            except (Unfit, ValueError, AttributeError):
                self._made = None
        return None if self._watched.hooked() else self._made

    def _has_product(self, x: Tensor) -> bool:
        found = {linear.int8_activations for linear in self._linears}
        path = chosen_path()
        many = x.shape[0] * x.shape[1] >= PANEL_TOKENS and found == {False} and path != DOT_PATH
        return path is not None and len(found) == 1 and not many

    def _turns(self, turns: Any, x: Tensor) -> bool:
        """Whether these are one text's angles, or the same for all texts."""
        if not isinstance(turns, tuple) or len(turns) != 2:
            return False
        return all(
            type(t) is Tensor and t.dtype == torch.float32 and t.is_contiguous() and t.device.type == "cpu"
            and t.shape == (1, x.shape[1], self.structure.turned)
            for t in turns
        )  # fmt: skip

    def _room(self, layer: Any, rows: int, start: int, count: int) -> tuple[Tensor, Tensor] | None:
        """Tensors for keys and values with what ``layer`` has and room for ``count`` more positions."""
        shape = self.structure.shape

        def fresh(capacity: int) -> tuple[Tensor, Tensor]:
            return tuple(torch.empty(rows, shape.groups, capacity, shape.dim) for _ in range(2))  # type: ignore[return-value]

        if layer is None:
            return fresh(count)
        owner, keys, values = layer.__dict__.get(ROOM_NAME, (0, None, None))
        if start:
            held = (layer.keys, layer.values)
            if any(t.shape != (rows, shape.groups, start, shape.dim) or t.dtype != torch.float32 for t in held):
                return None
            pairs = ((layer.keys, keys), (layer.values, values))
            if owner == id(layer) and all(_within(own, room, start + count) for own, room in pairs):
                return keys, values
        room = fresh(start + count + max(ROOM, start))
        for new, own in zip(room, (layer.keys, layer.values), strict=True):
            if start:
                new[:, :, :start] = own
        if not layer.is_initialized:
            layer.lazy_initialization(*room)
        layer.__dict__[ROOM_NAME] = (id(layer), *room)
        return room


def _layer_of(past: Any, place: int) -> Any:
    """The cache of a block, where it is transformers' own that grows; None for all others."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if type(past) is not DynamicCache or place < 0 or getattr(past, "offloading", False):
        return None
    kind = past.layer_class_to_replicate
    if kind is not None:
        while len(past.layers) <= place:
            past.layers.append(kind())
    layer = past.layers[place] if place < len(past.layers) else None
    return layer if type(layer) is DynamicLayer else None


def _within(own: Tensor, room: Tensor, end: int) -> bool:
    """Whether a cache's tensor still is the beginning of the room it was given, which ends behind ``end``."""
    return own.data_ptr() == room.data_ptr() and own.stride() == room.stride() and end <= room.shape[2]


@cache
def fused_decoder_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A block's class whose forward asks the library first."""
    names = list(inspect.signature(cls.forward).parameters)[2:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**kwargs, **dict(zip(("hidden_states", *names), args, strict=False))}
        usual = all(name in ARGUMENTS or value is None or value is False for name, value in given.items())
        if usual and not self.training and not torch.compiler.is_compiling():
            y = self._fused.run(self, given)
            if y is not None:
                return y
        return cls.forward(self, *args, **kwargs)

    def reduced(self: Any, protocol: Any) -> Any:
        return _blank, (cls,), dict(self.__dict__)

    own = {"forward": forward, "__reduce_ex__": reduced, "__module__": cls.__module__}
    return type(f"Fused{cls.__name__}", (cls,), own)


def _blank(cls: type[nn.Module]) -> nn.Module:
    made = fused_decoder_class(cls)  # type: ignore[arg-type]
    return made.__new__(made)
