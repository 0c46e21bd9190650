"""What is asked of a generator, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from layerwise.errors import InputError
from layerwise.generate.cache import check_kind
from layerwise.generate.choice import Choice
from layerwise.generate.network import CausalNetwork

Emit = Callable[[int, Sequence[int]], None]
"""Called with a text's place and its newest tokens as soon as they are certain."""


def silent(row: int, tokens: Sequence[int]) -> None:
    """An ``Emit`` that shows nothing."""


@dataclass(frozen=True)
class Wanted:
    """How many tokens, chosen how, over which cache. A token in the network's ``stop`` ends a text, as part of it.

    bare: for methods that contrast: each prompt once more without the context that it begins with; empty where there
          is none, and for everyone else a prompt is a prompt.
    """

    new_tokens: int = 128
    choice: Choice = Choice()
    cache: str = "16"
    ignore_stop: bool = False
    bare: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.new_tokens < 1:
            raise InputError(f"at least one new token must be asked for, not {self.new_tokens}")
        check_kind(self.cache)

    def cut(self, network: CausalNetwork, before: int, new: Sequence[int]) -> tuple[list[int], bool]:
        """The part of ``new`` that belongs to a text of ``before`` new tokens, and whether the text ends with it."""
        kept: list[int] = []
        for token in new[: self.new_tokens - before]:
            kept.append(token)
            if token in network.stop and not self.ignore_stop:
                return kept, True
        return kept, before + len(kept) >= self.new_tokens


@dataclass
class Work:
    """What a run took.

    prefill_seconds: of the prompts, with whatever was measured on them; decode_seconds: of all that follows.
    prefilled:     texts whose first token came out of the prompt's pass.
    full_passes:   passes through the last block, of all texts together in plain decoding, behind the prompts'.
    block_passes:  blocks of the network run in them and in drafts, however many tokens at a time; the block of a draft
                   head is none of them.
    drafted, accepted: tokens that were proposed, and those of them that the network confirmed.
    exited:        tokens that left before the last block and were kept.
    read_bytes:    weights of blocks and heads that the passes behind the prompts read, each pass counted once however
                   many tokens it is over: what would be time where nothing else took any. Plain decoding and methods
                   that draft count it.
    """

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    prefilled: int = 0
    full_passes: int = 0
    block_passes: int = 0
    drafted: int = 0
    accepted: int = 0
    exited: int = 0
    read_bytes: int = 0


@dataclass(frozen=True)
class Generation:
    """New tokens of every text, without its prompt, and what they took. ``notes``: settings that a method chose."""

    tokens: tuple[tuple[int, ...], ...]
    work: Work
    notes: dict[str, object] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second behind the prompts."""
        decoded = sum(map(len, self.tokens)) - self.work.prefilled
        return decoded / self.work.decode_seconds if decoded and self.work.decode_seconds > 0 else 0.0


def check_prompts(network: CausalNetwork, prompts: Sequence[Sequence[int]]) -> None:
    """Raises ``InputError`` for a prompt without tokens, or with one that the network has no row for."""
    if not prompts:
        raise InputError("there is no prompt to continue")
    for place, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"prompt {place + 1} has no tokens; give at least one word")
        if not all(0 <= token < network.words for token in prompt):
            raise InputError(f"prompt {place + 1} has tokens outside the network's {network.words} words")
