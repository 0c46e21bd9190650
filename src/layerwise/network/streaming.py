"""Running a network block by block, with one block's weights in memory.

The network's own forward is used, never a copy of it: with its blocks replaced by recorders it yields each block's
input and arguments (masks, rotary tables); with its blocks replaced by a player that hands over a stored hidden state
it runs what comes after the blocks (final norm, head, pooler).

    batch ─ head of the network ─→ hidden 0 ─ block 0 ─→ hidden 1 … ─ block n-1 ─→ hidden n ─ tail ─→ output
             (tables, embedding norm)                                                (norm, head or pooler)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from layerwise.errors import InputError
from layerwise.network.arranged_blocks import USES, ArrangedBlocks, ArrangedPart
from layerwise.network.network import Network
from layerwise.network.sites import Site
from layerwise.network.skeleton import materialised, parameter_owners
from layerwise.network.stand_in import Passing, StandIn

ROWS_FROM_DISK = 32 << 20  # a table with more float32 bytes than this is looked up row by row from the file
ROWS_REMEMBERED = 16 << 20  # bytes of such rows that are kept for the next look-up


class Weights(Protocol):
    """Where parameters come from: the dense checkpoint, or stored encodings decoded on the way."""

    def read(self, parameter: str) -> Tensor: ...
    def read_part(self, path: str) -> dict[str, Tensor]: ...
    def read_rows(self, parameter: str, index: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Batch:
    """Equal-length token sequences, or images. ``mask`` is None when nothing is padded.

    For images ``tokens`` only counts: it has an entry for each position of an image's hidden state (patches and class
    token; a single one where the network runs whole), and all entries are zero.
    """

    tokens: Tensor  # [sequences, length] int64
    mask: Tensor | None  # [sequences, length] int64, 1 for a token and 0 for padding
    pixels: Tensor | None = None  # [images, channels, height, width] float32, or [images, features]
    labels: Tensor | None = None  # [images] int64

    @property
    def counted(self) -> Tensor:
        """Boolean ``[sequences, length]``: the tokens that are not padding."""
        return torch.ones_like(self.tokens, dtype=torch.bool) if self.mask is None else self.mask.bool()

    def arguments(self) -> dict[str, Tensor]:
        if self.pixels is not None:
            return {"pixel_values": self.pixels}
        given = {"input_ids": self.tokens}
        if self.mask is not None:
            given["attention_mask"] = self.mask
        return given

    def rows(self, start: int, stop: int) -> Batch:
        parts = (None if t is None else t[start:stop] for t in (self.mask, self.pixels, self.labels))
        return Batch(self.tokens[start:stop], *parts)


class _Reached(Exception):
    """Leaves the network's forward once everything wanted has been recorded."""


class _Recorder(StandIn):
    """Passes hidden states on, or stops at the last block."""

    def __init__(self, block: nn.Module, last: bool, tuple_length: int) -> None:
        super().__init__(block, tuple_length)
        self.last = last

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = self.note(args, kwargs)
        if self.last:
            raise _Reached
        return self.returned(hidden)


class _Rows:
    """Rows of a parameter, read from where it lies when they are first looked up.

    A text has few of a table's words, and every block is entered with the same texts. What is remembered stays below
    ``ROWS_REMEMBERED`` bytes; what would lie above is read anew each time. Stored weights may change while a streamer
    is in use, so only the checkpoint's own are remembered.
    """

    def __init__(self, weights: Weights, parameter: str, count: int, remembered: bool) -> None:
        self.weights, self.parameter, self.remembered = weights, parameter, remembered
        with torch.inference_mode(False):  # ordinary tensors: some look-ups happen where gradients are taken
            self.place = torch.full((count,), -1)  # of each row among the remembered ones
        self.rows: Tensor | None = None

    @torch.inference_mode(False)
    def read(self, index: Tensor) -> Tensor:
        """Rows at a 1-D index without repetitions."""
        new = index[self.place[index] < 0]
        if len(new):
            if not self.remembered:
                return self.weights.read_rows(self.parameter, index)
            found = self.weights.read_rows(self.parameter, new)
            known = 0 if self.rows is None else len(self.rows)
            if (known + len(new)) * found.shape[1] * found.element_size() > ROWS_REMEMBERED:
                return self.weights.read_rows(self.parameter, index)
            self.rows = found if self.rows is None else torch.cat([self.rows, found])
            self.place[new] = torch.arange(known, known + len(new))
        return self.weights.read_rows(self.parameter, index) if self.rows is None else self.rows[self.place[index]]


class _RowsFromDisk(nn.Module):
    """An embedding whose rows are read when they are looked up."""

    def __init__(self, rows: _Rows, like: nn.Module) -> None:
        super().__init__()
        self.rows = rows
        object.__setattr__(self, "like", like)

    def forward(self, index: Tensor) -> Tensor:
        distinct, position = index.unique(return_inverse=True)
        rows = self.rows.read(distinct.cpu()).to(index.device)[position]
        # Gemma-like tables scale what they look up; the factor is the table's own attribute.
        factor = getattr(object.__getattribute__(self, "like"), "embed_scale", None)
        return rows if factor is None else rows * factor


class Streamer:
    """One network's forward in pieces, with weights from ``weights``.

    ``device`` is where blocks run. Everything is float32. ``parts``: of an arranged network ``Network.parts`` are run
    in the place of blocks, as many as ``count``; who measures each block by itself cannot do with that, and is
    refused. ``adaptive``: who runs the network as it is, and may leave blocks out.
    """

    def __init__(
        self,
        network: Network,
        weights: Weights | None = None,
        device: str = "cpu",
        parts: bool = False,
        adaptive: bool = False,
    ) -> None:
        if network.arrangement is not None and not parts:
            raise InputError(
                f"{network.name} is an arrangement of shared or parallel blocks, which cannot be run block by block; "
                f"do this to the network that it was made from"
            )
        if network.depths is not None and not adaptive:
            raise InputError(
                f"{network.name} runs its blocks for some tokens or texts only; calibrate and compress the network "
                f"that it was made from"
            )
        self.network = network
        blocks = network.tree.blocks  # none, where a module runs whole
        self.members: nn.ModuleList = (
            network.module.get_submodule(blocks[0].rpartition(".")[0]) if blocks else nn.ModuleList()  # type: ignore[assignment]
        )
        self.weights: Weights = weights if weights is not None else network
        self.steps: tuple[range, ...] = (  # of each part
            self.members.arrangement.parts()
            if isinstance(self.members, ArrangedBlocks)
            else tuple(range(i, i + 1) for i in range(len(self.members)))
        )
        self.device = torch.device(device)
        self.tuple_length: int | None = None
        self.rows: dict[str, _Rows] = {}  # of tables that are not read whole

    # ------------------------------------------------------------ blocks

    @property
    def count(self) -> int:
        """How many blocks, or parts, a forward pass runs one after the other."""
        return len(self.steps)

    @contextlib.contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block ``index`` with its weights in memory; of an arranged network, part ``index``."""
        if isinstance(self.members, ArrangedBlocks):
            with self._part(self.members, index) as part:
                yield part
            return
        path = self.network.tree.blocks[index]
        values = {k: v.to(self.device) for k, v in self.weights.read_part(path).items()}
        with materialised(self.network.module.get_submodule(path), values) as block:
            yield block

    @contextlib.contextmanager
    def _part(self, members: ArrangedBlocks, index: int) -> Iterator[Any]:
        """A part with the weights of its blocks, and of all uses' extras, which are small, in memory."""
        place = self.network.tree.blocks[0].rpartition(".")[0]
        with contextlib.ExitStack() as stack:
            extras = [(f"{place}.{USES}", members._modules[USES])] if members.arrangement.extras else []
            blocks = self.network.parts[index]
            for path, part in [*extras, *((b, self.network.module.get_submodule(b)) for b in blocks)]:
                values = {n: self.weights.read(f"{path}.{n}").to(self.device) for n, _ in part.named_parameters()}
                stack.enter_context(materialised(part, values))
            yield ArrangedPart([members.steps[i] for i in self.steps[index]])

    def run_block(self, block: nn.Module, hidden: Tensor, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
        """Output hidden state of a materialised block, ``[sequences, length, width]``."""
        out = block(hidden, *call[0], **call[1])
        if self.tuple_length is None:
            self.tuple_length = len(out) if isinstance(out, tuple) else 0
        return out[0] if isinstance(out, tuple) else out

    # ------------------------------------------------------------ before the blocks

    @contextlib.contextmanager
    def head_of_network(self) -> Iterator[Callable[[Batch, int], tuple[Tensor, Any]]]:
        """Yields ``enter(batch, index) -> (hidden 0, call of block index)``, tables and outer norms in memory."""
        with self._outer(with_head=False):
            yield self._enter

    def _enter(self, batch: Batch, index: int) -> tuple[Tensor, Any]:
        # Until a block has run once it is not known whether blocks return tuples, so only block 0 can be entered.
        stop = self.steps[index].start if self.tuple_length is not None else 0
        recorders: dict[int, _Recorder] = {}

        def stand_in(i: int, block: nn.Module) -> nn.Module:
            recorders[i] = _Recorder(block, i == stop, self.tuple_length or 0)
            return recorders[i]

        with self._blocks_replaced(stand_in), contextlib.suppress(_Reached):
            self.network.module(**self.arguments(batch))
        return recorders[0].hidden, recorders[stop].call

    # ------------------------------------------------------------ after the blocks

    @contextlib.contextmanager
    def tail(self, with_head: bool = True) -> Iterator[Callable[[Batch, Tensor], Any]]:
        """Yields ``run(batch, hidden n) -> the network's output object``, head and outer weights in memory.

        with_head: who does not let the forward come as far as the head can do without its weights.
        """
        with self._outer(with_head):
            yield self._leave

    def _leave(self, batch: Batch, hidden: Tensor) -> Any:
        last = len(self.members) - 1

        def stand_in(i: int, block: nn.Module) -> nn.Module:
            return Passing(block, self.tuple_length or 0, hidden if i == last else None)

        with self._blocks_replaced(stand_in):
            return self.network.module(**self.arguments(batch))

    # ------------------------------------------------------------ parts

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """What the network's own forward is called with."""
        given = {k: v.to(self.device) for k, v in batch.arguments().items()}
        return given if batch.pixels is not None else {**given, "use_cache": False}

    @contextlib.contextmanager
    def _outer(self, with_head: bool) -> Iterator[None]:
        """Parameters outside the blocks in memory; large tables are looked up from disk instead."""
        module, tree = self.network.module, self.network.tree
        heads = {s.head for s in tree.sites if s.head} | {s.name for s in tree.sites if s.kind == "head"}
        values: dict[str, Tensor] = {}
        with contextlib.ExitStack() as stack:
            names = self.network.outer_parameters()
            for site in tree.sites:
                if site.kind in ("table", "position") and site.parameters * 4 > ROWS_FROM_DISK:
                    stack.enter_context(_replaced(module, site.name, self._rows_from_disk(site)))
                    names = [n for n in names if n != site.parameter]
                if site.head and with_head:
                    values[f"{site.head}.weight"] = self.weights.read(site.parameter).to(self.device)
            for name in names:
                if with_head or name.rpartition(".")[0] not in heads:
                    tied = next((s for s in tree.sites if s.head and s.parameter == name), None)
                    shared = values.get(f"{tied.head}.weight") if tied else None
                    values[name] = shared if shared is not None else self.weights.read(name).to(self.device)
            for first, *others in parameter_owners(module).values():  # a bias may hang under two names as well
                for other in others:
                    if first in values and (with_head or other.rpartition(".")[0] not in heads):
                        values.setdefault(other, values[first])
            stack.enter_context(materialised(module, values))
            if str(self.device) != "cpu":
                _move_buffers(module, self.device)
            yield

    def _rows_from_disk(self, site: Site) -> nn.Module:
        if site.parameter not in self.rows:
            self.rows[site.parameter] = _Rows(self.weights, site.parameter, site.rows, self.weights is self.network)
        return _RowsFromDisk(self.rows[site.parameter], self.network.module.get_submodule(site.name))

    @contextlib.contextmanager
    def _blocks_replaced(self, stand_in: Callable[[int, nn.Module], nn.Module]) -> Iterator[None]:
        members = self.members
        if isinstance(members, ArrangedBlocks):
            steps = members.steps
            try:
                members.steps = [stand_in(i, step) for i, step in enumerate(steps)]  # type: ignore[arg-type, misc]
                yield
            finally:
                members.steps = steps
            return
        originals = list(members.children())
        try:
            for i, block in enumerate(originals):
                members[i] = stand_in(i, block)
            yield
        finally:
            for i, block in enumerate(originals):
                members[i] = block


@contextlib.contextmanager
def _replaced(module: nn.Module, path: str, stand_in: nn.Module) -> Iterator[None]:
    """``module`` with another one at ``path``."""
    parent_path, _, leaf = path.rpartition(".")
    parent = module.get_submodule(parent_path)
    original = parent._modules[leaf]
    parent._modules[leaf] = stand_in
    try:
        yield
    finally:
        parent._modules[leaf] = original


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for member in module.modules():
        for name, buffer in member._buffers.items():
            if buffer is not None and buffer.device != device:
                member._buffers[name] = buffer.to(device)


def rows_at_once(batch: Batch, width: int, limit: int = 2 << 20) -> Sequence[tuple[int, int]]:
    """Ranges of sequences so that ``sequences * length * width`` stays below ``limit`` elements (at least one)."""
    count, length = batch.tokens.shape
    step = max(1, limit // max(1, length * width))
    return [(start, min(start + step, count)) for start in range(0, count, step)]
