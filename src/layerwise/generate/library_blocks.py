"""Which blocks of a causal network the compiled library runs (``network/decoder_structure.py``), and its last norm and
head; what does not fit is left to torch, block by block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from layerwise.kernels.decoder import Block, Head, PackedDecoder, Shape, takes
from layerwise.kernels.library import chosen_path
from layerwise.kernels.matrix import DOT_PATH, PANEL_TOKENS
from layerwise.network.block_structure import Unfit
from layerwise.network.decoder_structure import (
    DecoderStructure,
    decoder_structure_of,
    matrix_of,
    norm_of,
    packed_decoder_block,
)
from layerwise.network.packed import Packed, PackedHead, PackedLinear, kernel_takes
from layerwise.network.watched import Watched

if TYPE_CHECKING:
    from layerwise.generate.network import CausalNetwork

MOST_TOKENS = 1024  # in one pass: the attention of more is faster by torch's product of matrices


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
        known: DecoderStructure | None = None
        for index, module in enumerate(network.blocks):
            try:
                if network.slots != len(network.blocks):
                    raise Unfit("blocks of this network run several times")
                if network.rotary is None:
                    raise Unfit("this network has no rotary tables")
                found = decoder_structure_of(module, network.module.config, known)
                if known is not None and (found.shape, found.turned) != (known.shape, known.turned):
                    raise Unfit("its heads are not those of the first block")
                block = packed_decoder_block(module, found, network.windows[index])
            except Unfit as why:
                self.left[index] = str(why)
                continue
            known = found
            self.places[index] = len(blocks)
            blocks.append(block)
            self._linears += [module.get_submodule(name) for name in found.linears]  # type: ignore[misc]
        if known is None:
            return
        shape, head = known.shape, _head_of(network, known.shape)
        if head is not None:
            owner = network.head.table if isinstance(network.head, PackedHead) else network.head
            self._linears.append(owner)  # type: ignore[arg-type]
        self.decoder = PackedDecoder(shape, blocks, head)

    def present(self) -> bool:
        """Whether the network is still what it was."""
        return self._watched.same_modules() and self._watched.same_tensors()

    def int8(self) -> bool | None:
        """Whether inputs of products are rounded to int8; None where that is not the same for all."""
        found = {linear.int8_activations for linear in self._linears}
        return found.pop() if len(found) == 1 else None

    def takes(self, hidden: Tensor, int8: bool) -> bool:
        """Whether the library is for these hidden states now."""
        assert self.decoder is not None
        if not takes(hidden, self.decoder.shape.width) or not kernel_takes(hidden):
            return False
        path, tokens = chosen_path(), hidden.shape[0] * hidden.shape[1]
        if path is None or hidden.shape[1] > MOST_TOKENS:
            return False
        if not int8 and path != DOT_PATH and tokens >= PANEL_TOKENS:
            return False  # so many exact activations are multiplied by panels there
        if self._attention != _attention_of(self.network) or self.network.module.training:
            return False
        return not self._watched.hooked() and not self._watched.wants_gradient()

    def runs(self, blocks: Iterable[int]) -> Iterator[tuple[range | None, int]]:
        """``blocks`` cut into runs: places of what the library runs one behind the other, or None and a block."""
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


# ---------------------------------------------------------------- norm and head


def _head_of(network: CausalNetwork, shape: Shape) -> Head | None:
    """The last norm and the head, where the library has a product for it; None leaves both to torch."""
    module = network.head
    norm = norm_of(network.norm)
    if norm is None or norm[1] != shape.centred or len(norm[0].weight) != shape.width:
        return None
    if isinstance(module, PackedHead) and module.table.scale is None:
        owner: Packed = module.table
        bias: Any = module.bias if module.bias_owner is None else module.bias_owner.bias
    elif isinstance(module, PackedLinear):
        owner, bias = module, module.bias
    else:
        return None
    try:
        return Head(norm[0], matrix_of("head", owner), bias)
    except Unfit:
        return None
