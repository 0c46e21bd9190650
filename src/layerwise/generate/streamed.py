"""Blocks that come from disk when they are run: while one computes, the next is read.

    reader      ── read 1 ──┬── read 2 ──┬── read 3 ──┬─ …
    computing               └─ block 1 ──└─ block 2 ──└─ …        time = read 1 + sum of max(read, compute)

At most two blocks are in memory, the one that computes and the one that is read, beside those that stay: the first so
many, as memory allows. Behind the last block the first that is not kept is read again, for the next token. A block is
run by its own module with the values put in its parameters' places for the call, so the network's numbers are those of
a network in memory, bit for bit. Reading releases the interpreter, so the two do overlap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from layerwise.errors import InputError
from layerwise.generate.network import CausalNetwork, causal_network
from layerwise.network import safetensors_file
from layerwise.network.network import Network, open_network
from layerwise.network.skeleton import parameter_owners

Values = dict[str, Tensor]
FILE = "blocks.safetensors"


class Reader:
    """Hands out the values of blocks in turn.

    resident: how many of the first blocks stay; ahead: whether the next is read while one computes.
    held_at_most: bytes of blocks that were in memory at one time; waited: seconds that computing stood still.
    """

    def __init__(self, read: Callable[[int], Values], sizes: Sequence[int]) -> None:
        self.read, self.sizes = read, sizes
        self.resident, self.ahead = 0, True
        self.held_at_most, self.waited, self.reads = 0, 0.0, 0
        self._kept: dict[int, Values] = {}
        self._coming: tuple[int, Future[Values]] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def set_up(self, resident: int, ahead: bool) -> None:
        """Forget everything that is in memory, and count anew."""
        self.close()
        self.resident, self.ahead = resident, ahead
        self.held_at_most, self.waited, self.reads = 0, 0.0, 0

    def take(self, index: int) -> Values:
        """The values of a block; what comes behind it is being read when this returns."""
        began = time.perf_counter()
        values = self._kept.get(index)
        if values is None:
            coming, self._coming = self._coming, None
            if coming is not None:
                found = coming[1].result()  # also of a block that is not the next after all: memory for two
                values = found if coming[0] == index else None
            if values is None:
                values = self.read(index)
            self.reads += 1
            if index < self.resident:
                self._kept[index] = values
        self.waited += time.perf_counter() - began
        held = sum(self.sizes[i] for i in self._kept) + (0 if index in self._kept else self.sizes[index])
        after = self._next(index)
        if self.ahead and after is not None:
            if self._coming is None:
                self._thread = self._thread or ThreadPoolExecutor(1, "layerwise-blocks")
                self._coming = after, self._thread.submit(self.read, after)
            held += self.sizes[self._coming[0]]
        self.held_at_most = max(self.held_at_most, held)
        return values

    def _next(self, index: int) -> int | None:
        """The next block that has to be read; None where all others stay."""
        count = len(self.sizes)
        return next((i % count for i in range(index + 1, index + count) if i % count not in self._kept), None)

    def close(self) -> None:
        """Let go of all blocks and of the reading thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        self._thread, self._coming, self._kept = None, None, {}


class StreamedBlock(nn.Module):
    """A block whose values are fetched for each call."""

    def __init__(self, inner: nn.Module, index: int, reader: Reader) -> None:
        super().__init__()
        self.inner, self.index, self.reader = inner, index, reader

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.inner, self.reader.take(self.index), args, kwargs)


def reader_of(network: CausalNetwork) -> Reader | None:
    """What a network's blocks are read by; None where they are in memory."""
    block = network.blocks[0]
    return block.reader if isinstance(block, StreamedBlock) else None


# ---------------------------------------------------------------- opening


def open_streamed(source: str, dtype: torch.dtype | None = None) -> tuple[CausalNetwork, Network]:
    """A dense checkpoint with tables, norms and head in memory and blocks on disk.

    dtype: to compute in; by default bfloat16 where the checkpoint is, else float32, as for a network in memory.
    """
    network = open_network(source)
    module = network.module
    kind = dtype or (torch.bfloat16 if network.plain_dtype == torch.bfloat16 else torch.float32)
    owners = parameter_owners(module)
    for name in network.outer_parameters():
        value = nn.Parameter(network.read(name).to(kind), requires_grad=False)
        for owner, _, leaf in (n.rpartition(".") for n in owners[id(module.get_parameter(name))]):
            module.get_submodule(owner)._parameters[leaf] = value
    paths = network.tree.blocks
    inner = [module.get_submodule(path) for path in paths]
    sizes = [sum(p.numel() for p in block.parameters()) * kind.itemsize for block in inner]

    def read(index: int) -> Values:
        names = [name for name, _ in inner[index].named_parameters()]
        return {name: network.read(f"{paths[index]}.{name}").to(kind) for name in names}

    reader = Reader(read, sizes)
    for index, (path, block) in enumerate(zip(paths, inner, strict=True)):
        owner, _, leaf = path.rpartition(".")
        module.get_submodule(owner)._modules[leaf] = StreamedBlock(block, index, reader)
    _read_generation_config(module, network.checkpoint.directory)
    try:
        return causal_network(module), network
    finally:
        reader.close()


def _read_generation_config(module: nn.Module, folder: Path) -> None:
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        module.generation_config = GenerationConfig.from_pretrained(str(folder))  # type: ignore[assignment]


def spilled(network: CausalNetwork, folder: Path) -> CausalNetwork:
    """A network in memory with its blocks written to a folder, from which they are read; it stays as it is itself."""
    layout, held = {}, {}
    for index, block in enumerate(network.blocks):
        for name, value in (*block.named_parameters(), *block.named_buffers()):
            layout[f"{index}.{name}"] = (value.dtype, tuple(value.shape))
            held[f"{index}.{name}"] = value
    safetensors_file.write(folder / FILE, layout, held.__getitem__)
    tensors, _ = safetensors_file.read_header(folder / FILE)
    names = [[n for n in held if n.startswith(f"{index}.")] for index in range(len(network.blocks))]

    def read(index: int) -> Values:
        found = {name.partition(".")[2]: safetensors_file.read(tensors[name]) for name in names[index]}
        return {name: value.to(network.device) for name, value in found.items()}

    reader = Reader(read, [sum(held[name].nbytes for name in own) for own in names])
    blocks = tuple(StreamedBlock(block, index, reader) for index, block in enumerate(network.blocks))
    return replace(network, blocks=blocks)


def resident_blocks(sizes: Sequence[int], memory: float) -> int:
    """How many blocks can stay beside two that come and go, in so many megabytes; 0 asks for two blocks' worth.

    Raises ``InputError`` for less than two blocks.
    """
    if not memory:
        return 0
    budget, largest = memory * 1e6, max(sizes)
    if budget >= sum(sizes):
        return len(sizes)
    if budget < 2 * largest:
        raise InputError(f"two blocks of this network take {2 * largest / 1e6:.1f} MB; give memory that much or more")
    staying, count = 2 * largest, 0
    while count < len(sizes) and staying + sizes[count] <= budget:
        staying += sizes[count]
        count += 1
    return count
