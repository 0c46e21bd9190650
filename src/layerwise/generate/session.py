"""A decode session: one or more texts, one cache, and passes through any run of blocks.

The state is the cache and, for each row, how many of its positions are committed (``lengths``). A pass says at which
position it starts; what it writes counts only once ``lengths`` covers it:

    prefill(prompts)              all blocks over the prompts; lengths = theirs
    full(tokens)                  all blocks over the next tokens, at lengths; then lengths += count
    embed(tokens, starts)         tokens -> hidden 0
    run(hidden, blocks, starts)   a run of blocks, e.g. range(0, 4) now and range(4, 12) later for the same positions
    scores(hidden)                norm and head, after any block (an exit)
    rollback(lengths)             positions at and behind a length no longer count; the next pass writes over them
    keep(slots)                   of a pass over a tree of drafts, only these count

Sessions never draw or choose tokens. A row's queries see keys at or before their own position, within the block's
window; keys behind it, left over from drafts, are masked or overwritten. Rows may have different lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import InputError
from layerwise.generate.cache import Cache
from layerwise.generate.library_passes import LibraryPasses
from layerwise.generate.network import CausalNetwork


@dataclass(frozen=True)
class Branch:
    """New positions of one row that are nodes of a tree behind ``base`` positions, in the cache one behind the other.

    depths: of all nodes so far, int64 [nodes]: a node's position is ``base`` + its depth.
    sees:   bool [count, nodes]: which nodes each new one sees, itself included; the new ones are the last.
    """

    base: int
    depths: Tensor
    sees: Tensor

    @property
    def places(self) -> Tensor:
        """Positions of the new nodes, ``[1, count]``."""
        return self.base + self.depths[None, -len(self.sees) :]

    @property
    def start(self) -> int:
        """Where the new nodes lie in the cache."""
        return self.base + len(self.depths) - len(self.sees)


class Session:
    """``rows`` texts of at most ``capacity`` tokens each. Call within ``torch.inference_mode()``.

    spare:      places in the cache beyond, for nodes of trees.
    by_library: let the compiled library run the blocks that it is for (``library_blocks.py``), as they are now.
    """

    def __init__(
        self,
        network: CausalNetwork,
        rows: int,
        capacity: int,
        cache: str = "16",
        spare: int = 0,
        by_library: bool = True,
    ) -> None:
        if capacity > network.longest:
            raise InputError(
                f"prompt and new tokens come to {capacity} positions, but this {network.name} was made for "
                f"{network.longest}; shorten the prompt or ask for fewer new tokens"
            )
        self.network, self.rows, self.capacity = network, rows, capacity
        self.cache = Cache(network.slots, capacity + spare, cache)
        self.lengths = [0] * rows
        self._rotary: tuple[Tensor, Tensor] | None = None
        self._library = LibraryPasses.of(self) if by_library and cache == "16" else None

    # ------------------------------------------------------------ whole passes

    def prefill(self, prompts: Sequence[Sequence[int]], seen: list[Tensor] | None = None) -> Tensor:
        """Run the prompts, padded behind their ends; return the last hidden state of each, ``[rows, 1, d]``.

        seen: filled with the hidden states behind every block, ``[rows, longest prompt, d]`` each, for exits.
        """
        longest = max(map(len, prompts))
        tokens = torch.tensor([[*p, *[p[-1]] * (longest - len(p))] for p in prompts])
        hidden = self.embed(tokens, [0] * self.rows)
        if seen is None:
            hidden = self.run(hidden, range(len(self.network.blocks)), [0] * self.rows)
        else:
            for block in range(len(self.network.blocks)):
                hidden = self.run(hidden, (block,), [0] * self.rows)
                seen.append(hidden)
        self.lengths = [len(p) for p in prompts]
        last = torch.tensor([len(p) - 1 for p in prompts], device=hidden.device)
        return hidden[torch.arange(self.rows, device=hidden.device), last][:, None]

    def full(self, tokens: Tensor) -> Tensor:
        """All blocks over the next ``tokens`` [rows, count]; their scores ``[rows, count, words]``."""
        starts, every = self.lengths, range(len(self.network.blocks))
        hidden = self.embed(tokens, starts)
        scores = None if self._library is None else self._library.scores(hidden, starts)
        if scores is None:
            scores = self.scores(self.run(hidden, every, starts))
        self.lengths = [n + tokens.shape[1] for n in starts]
        return scores

    def rollback(self, lengths: Sequence[int]) -> None:
        """Only the first ``lengths`` positions of each row count from now on."""
        if any(not 0 <= new <= self.capacity for new in lengths):
            raise ValueError(f"lengths lie between 0 and {self.capacity}, not {list(lengths)}")
        self.lengths = list(lengths)

    # ------------------------------------------------------------ parts of a pass

    def embed(self, tokens: Tensor, starts: Sequence[int], branch: Branch | None = None) -> Tensor:
        """Hidden states ``[rows, count, d]`` before the first block."""
        tokens = tokens.to(self.network.device)
        hidden: Tensor = self.network.table(tokens)
        if self.network.positions is not None:
            hidden = hidden + self.network.positions(self._places(starts, tokens.shape[1], branch))
        return hidden

    def run(self, hidden: Tensor, blocks: Iterable[int], starts: Sequence[int], branch: Branch | None = None) -> Tensor:
        """Hidden states ``[rows, count, d]`` behind these blocks; their keys and values are written at ``starts``.

        branch: of a session of one row, whose new positions are nodes of a tree; then ``starts`` does not count.
        """
        if branch is None and self._library is not None and self._library.takes(hidden):
            return self._library.run(hidden, blocks, starts)
        return self.run_by_torch(hidden, blocks, starts, branch)

    def run_by_torch(
        self, hidden: Tensor, blocks: Iterable[int], starts: Sequence[int], branch: Branch | None = None
    ) -> Tensor:
        """The same by the blocks' own modules."""
        network, count = self.network, hidden.shape[1]
        starts = starts if branch is None else [branch.start]
        arguments: dict[str, Any] = {
            "past_key_values": self.cache, "use_cache": True, "position_ids": self._places(starts, count, branch),
        }  # fmt: skip
        if network.rotary is not None:
            arguments["position_embeddings"] = self._turns(hidden, starts, count, branch)
        self.cache.starts = starts
        masks: dict[int | None, Tensor | None] = {}
        for index in blocks:
            window = network.windows[index]
            if window not in masks:
                masks[window] = (
                    self._mask(starts, count, window)
                    if branch is None
                    else _branch_mask(branch, window).to(hidden.device)
                )
            out = network.blocks[index](hidden, attention_mask=masks[window], **arguments)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    def scores(self, hidden: Tensor) -> Tensor:
        """Scores ``[rows, count, words]`` behind any block: final norm, then head."""
        found = None if self._library is None else self._library.head(hidden)
        return self.network.scores(hidden) if found is None else found

    # ------------------------------------------------------------ positions

    def _places(self, starts: Sequence[int], count: int, branch: Branch | None = None) -> Tensor:
        """Positions ``[rows, count]``."""
        device = self.network.device
        if branch is not None:
            return branch.places.to(device)
        if len(set(starts)) == 1:
            return torch.arange(starts[0], starts[0] + count, device=device).expand(self.rows, count)
        return torch.tensor(starts, device=device)[:, None] + torch.arange(count, device=device)

    def _turns(
        self, hidden: Tensor, starts: Sequence[int], count: int, branch: Branch | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[rows or 1, count, width]``, cut out of tables that are made once."""
        cosine, sine = self._tables(hidden)
        if branch is None and len(set(starts)) == 1:
            own = slice(starts[0], starts[0] + count)
            return cosine[:, own], sine[:, own]
        places = self._places(starts, count, branch)
        return cosine[0][places], sine[0][places]

    def _tables(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        if self._rotary is None:
            every = torch.arange(self.capacity, device=hidden.device)[None]
            self._rotary = self.network.rotary(hidden[:1], every)  # type: ignore[misc]
        return self._rotary  # type: ignore[return-value]

    def turns(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of every position ``[capacity, width]``; None for a network without."""
        if self.network.rotary is None:
            return None
        cosine, sine = self._tables(hidden)
        return cosine[0].contiguous(), sine[0].contiguous()

    def _mask(self, starts: Sequence[int], count: int, window: int | None) -> Tensor | None:
        """True where a query sees a key, ``[rows or 1, 1, count, end]``; None where the kernel knows by itself."""
        even, end = len(set(starts)) == 1, max(starts) + count
        unbounded = window is None or end <= window
        if even and unbounded and (count == 1 or starts[0] == 0):
            return None
        queries = self._places(starts, count)[: 1 if even else None]
        keys = torch.arange(end, device=queries.device)
        sees = keys <= queries[:, :, None]
        if not unbounded:
            sees &= keys > queries[:, :, None] - window  # type: ignore[operator]
        return sees[:, None]


def _branch_mask(branch: Branch, window: int | None) -> Tensor:
    """True where a node sees a key, ``[1, 1, count, base + nodes]``: all before the tree, and its ancestors."""
    sees = torch.cat([torch.ones(len(branch.sees), branch.base, dtype=torch.bool), branch.sees], 1)
    if window is not None:
        keys = torch.cat([torch.arange(branch.base), branch.base + branch.depths])
        sees = sees & (keys > branch.places[0][:, None] - window)
    return sees[None, None]
