"""A causal network in memory, taken apart so that its blocks can be run one by one.

    tokens ─ table (+ positions) ─→ hidden 0 ─ block 0 ─→ hidden 1 … ─ block L-1 ─→ hidden L ─ norm ─ head ─→ scores

The parts are found by structure: the input table and the head as transformers names them, the blocks as the list of
equal modules, and beside that list the norm, the rotary tables, the table of positions. Whether they are all there is
to the network is tried: a few tokens go through the network's own forward and through the parts, and a network whose
scores come out otherwise (scaled embeddings, capped scores, …) is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.network.adaptive import running_of
from layerwise.network.block_structure import evaluated
from layerwise.network.fused_blocks import plain_class

if TYPE_CHECKING:
    from layerwise.generate.library_blocks import LibraryBlocks
    from layerwise.generate.session import Session

NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
TRIED = 7  # tokens, the last of them alone
DYNAMIC = ("dynamic", "longrope")  # rotary tables that change with the length of the text


@dataclass(frozen=True, eq=False)
class CausalNetwork:
    """The parts of a causal network, each in the network's own module.

    windows:   per block, how many positions it looks back, or None for all.
    longest:   positions that it was made for.
    stop:      ids that end a text.
    """

    module: nn.Module
    table: nn.Module
    positions: nn.Module | None
    rotary: nn.Module | None
    blocks: tuple[nn.Module, ...]
    norm: nn.Module
    head: nn.Module
    windows: tuple[int | None, ...]
    longest: int
    words: int
    stop: frozenset[int]

    @property
    def name(self) -> str:
        return type(self.module).__name__

    @cached_property
    def device(self) -> torch.device:
        return next((t.device for t in (*self.module.parameters(), *self.module.buffers())), torch.device("cpu"))

    @property
    def slots(self) -> int:
        """Of the cache: one a block; a step of an arranged network has one for each run of a block."""
        return sum(getattr(block, "uses", 1) for block in self.blocks)

    def scores(self, hidden: Tensor) -> Tensor:
        """Scores of every word ``[…, words]`` as the head reads them off hidden states ``[…, d]`` of any block."""
        scores: Tensor = self.head(self.norm(hidden))
        return scores

    def session(self, rows: int = 1, capacity: int | None = None, cache: str = "16", spare: int = 0) -> Session:
        """A fresh cache for so many texts of at most ``capacity`` tokens, with room for ``spare`` nodes of trees."""
        from layerwise.generate.session import Session

        return Session(self, rows, self.longest if capacity is None else capacity, cache, spare)

    def library_blocks(self) -> LibraryBlocks:
        """What of the network the compiled library runs, as it is now: found once, and again after a change."""
        from layerwise.generate.library_blocks import LibraryBlocks

        found: LibraryBlocks | None = self.__dict__.get("_library_blocks")
        if found is None or not found.present():
            found = self.__dict__["_library_blocks"] = LibraryBlocks(self)
        return found

    @cached_property
    def read_bytes(self) -> tuple[int, int]:
        """Bytes of one block (the mean) and of the head: what a pass of one token reads from memory."""
        blocks = sum(_bytes(block) for block in self.blocks) // len(self.blocks)
        return blocks, _bytes(getattr(self.head, "table", self.head))


def causal_network(module: nn.Module) -> CausalNetwork:
    """Take a causal network apart. Raises ``InputError`` for one that the parts do not make up."""
    name = type(module).__name__
    config: Any = module.config
    refusal = InputError(f"layerwise cannot run the blocks of a {name} one by one; use transformers' own generate")
    if running_of(module) is not None:
        raise refusal
    parent, blocks = _blocks(module)
    norm = next((getattr(parent, n) for n in NORMS if hasattr(parent, n)), None) if parent is not None else None
    if parent is None or norm is None:
        raise refusal
    rope: Any = getattr(config, "rope_parameters", None) or {}
    if isinstance(rope, dict) and rope.get("rope_type") in DYNAMIC:
        raise InputError(f"the rotary tables of this {name} change with the text's length; use transformers' generate")
    found = CausalNetwork(
        module=module,
        table=module.get_input_embeddings(),  # type: ignore[operator]
        positions=getattr(parent, "wpe", None),
        rotary=getattr(parent, "rotary_emb", None),
        blocks=blocks,
        norm=norm,
        head=module.get_output_embeddings(),  # type: ignore[operator]
        windows=_windows(config, len(blocks)),
        longest=int(getattr(config, "max_position_embeddings", None) or 1 << 20),
        words=int(config.vocab_size),
        stop=_stop_ids(module),
    )
    if not _agrees(found):
        raise refusal
    return found


@torch.inference_mode()
def _agrees(network: CausalNetwork) -> bool:
    """Whether the parts, with a cache, give the scores of the network's own forward, from exact activations."""
    with evaluated(network.module):
        return _agrees_now(network)


def _agrees_now(network: CausalNetwork) -> bool:
    from layerwise.generate.session import Session

    count = min(TRIED, network.longest)
    tokens = (torch.arange(count) * 7919 + 13) % network.words
    own: Tensor = network.module(tokens[None].to(network.device), use_cache=False).logits[0].float()
    try:
        session = Session(network, 1, count, by_library=False)
        parts = [session.full(tokens[None, :-1]), session.full(tokens[None, -1:])]
    except (TypeError, AttributeError, KeyError, IndexError, RuntimeError):
        return False  # a block wants something else than what it was given
    apart = (torch.cat(parts, 1)[0].float() - own).abs().amax()
    tolerance = 1e-3 if next(network.norm.parameters()).dtype.itemsize >= 4 else 5e-2
    return bool(apart <= tolerance * own.abs().amax().clamp(min=1e-6))


def by_columns(module: nn.Module) -> None:
    """Lay the matrices of dense linears column by column in memory; shapes and values stay.

    On a CPU a product with one to three vectors then takes 2 to 35 % less time (MKL, matrices of 192 x 192 to 16,000 x
    768), with more vectors about the same; decoding has one, or a few that are verified together.
    """
    for member in module.modules():
        if type(member) is nn.Linear and member.weight.device.type == "cpu" and member.weight.dtype.itemsize >= 4:
            member.weight.data = member.weight.data.t().contiguous().t()


def _blocks(module: nn.Module) -> tuple[nn.Module | None, tuple[nn.Module, ...]]:
    """The longest outermost list of modules of one class that call themselves by their place, and what holds it."""
    best: tuple[nn.Module | None, tuple[nn.Module, ...]] = (None, ())
    for parent in module.modules():
        for child in parent.children():
            if not isinstance(child, nn.ModuleList) or len(child) <= len(best[1]):
                continue
            members = tuple(child)
            if len({plain_class(m) for m in members}) == 1 and any(
                hasattr(m, "layer_idx") for m in members[0].modules()
            ):
                best = parent, members
    return best


def _windows(config: Any, count: int) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return (None,) * count
    if not isinstance(kinds, list) or len(kinds) < count:
        return (int(window),) * count
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds[:count])


def _stop_ids(module: nn.Module) -> frozenset[int]:
    given: Any = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    if given is None:
        given = getattr(module.config, "eos_token_id", None)
    return frozenset([given] if isinstance(given, int) else given or ())


def _bytes(module: nn.Module) -> int:
    """Bytes of a module's weights in their stored form, each counted once."""
    held = {id(t): t.nbytes for t in (*module.parameters(), *module.buffers())}
    return sum(held.values())
