"""Running block by block gives what the whole network gives, whatever was padded and wherever its tables lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from layerwise.network import streaming
from layerwise.network.network import Network, open_network
from layerwise.network.streaming import Batch, Streamer, rows_at_once

LENGTHS = (9, 6, 3)
LARGEST_TOKEN = 100  # every tiny vocabulary is larger


def batch_of(padded: bool) -> Batch:
    tokens = torch.randint(5, LARGEST_TOKEN, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    if not padded:
        return Batch(tokens, None)
    mask = torch.stack([(torch.arange(max(LENGTHS)) < length).long() for length in LENGTHS])
    return Batch(torch.where(mask.bool(), tokens, torch.zeros_like(tokens)), mask)


@torch.inference_mode()
def streamed(network: Network, batch: Batch) -> tuple[list[Tensor], Tensor]:
    """(hidden states at every block boundary, output) with one block in memory at a time."""
    streamer = Streamer(network)
    with streamer.head_of_network() as enter:
        states = [enter(batch, 0)[0]]
    for index in range(len(network.tree.blocks)):
        with streamer.block(index) as block, streamer.head_of_network() as enter:
            states.append(streamer.run_block(block, states[-1], enter(batch, index)[1]))
    with streamer.tail() as leave:
        return states, leave(batch, states[-1])[0]


@torch.inference_mode()
def whole(path: Path, network: Network, batch: Batch) -> tuple[list[Tensor], Tensor]:
    """The same from the network that transformers loads."""
    import transformers

    dense = getattr(transformers, network.architecture).from_pretrained(path, dtype=torch.float32).eval()
    states: list[Tensor] = []
    hooks = [
        dense.get_submodule(name).register_forward_hook(
            lambda _, given, out: states.append(out[0] if isinstance(out, tuple) else out)
        )
        for name in network.tree.blocks
    ]
    first = dense.get_submodule(network.tree.blocks[0]).register_forward_pre_hook(
        lambda _, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    output = dense(**batch.arguments())[0]
    for hook in (*hooks, first):
        hook.remove()
    return states, output


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_streamed_is_whole(tiny_network: Path, padded: bool) -> None:
    network, batch = open_network(tiny_network), batch_of(padded)
    found, output = streamed(network, batch)
    expected, wanted = whole(tiny_network, network, batch)
    assert len(found) == len(expected) == len(network.tree.blocks) + 1
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs)[batch.counted].abs().max() < 1e-5
    counted = batch.counted if output.shape[:2] == batch.tokens.shape else slice(None)
    assert (output - wanted)[counted].abs().max() < 1e-5


def test_tables_can_be_looked_up_from_disk(tiny_network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, batch = open_network(tiny_network), batch_of(padded=True)
    in_memory, output = streamed(network, batch)
    monkeypatch.setattr(streaming, "ROWS_FROM_DISK", 0)
    reads: list[str] = []
    original = Network.read_rows

    def noted(self: Network, parameter: str, index: Tensor) -> Tensor:
        reads.append(parameter)
        return original(self, parameter, index)

    monkeypatch.setattr(Network, "read_rows", noted)
    from_disk, other = streamed(network, batch)
    assert {s.parameter for s in network.tree.sites if s.kind in ("table", "position")} == set(reads)
    assert all(torch.equal(a, b) for a, b in zip(in_memory, from_disk, strict=True))
    assert torch.equal(output, other)


def test_nothing_stays_in_memory(tiny_network: Path) -> None:
    network = open_network(tiny_network)
    streamed(network, batch_of(padded=True))
    assert all(p.is_meta for p in network.module.parameters())
    again = {name: type(module) for name, module in open_network(tiny_network).module.named_modules()}
    assert {name: type(module) for name, module in network.module.named_modules()} == again


def test_an_error_inside_puts_everything_back(tiny_llama: Path) -> None:
    network = open_network(tiny_llama)
    streamer = Streamer(network)
    with pytest.raises(ZeroDivisionError), streamer.tail(), streamer.block(0) as block:
        assert not any(p.is_meta for p in block.parameters())
        raise ZeroDivisionError
    assert all(p.is_meta for p in network.module.parameters())


def test_gradients_reach_the_input_of_a_block(tiny_bert: Path) -> None:
    """The reverse pass asks a block for them although no weight does."""
    network, batch = open_network(tiny_bert), batch_of(padded=False)
    streamer = Streamer(network)
    with streamer.head_of_network() as enter, streamer.block(0) as block:
        hidden, call = enter(batch, 0)
        hidden = hidden.detach().requires_grad_()
        streamer.run_block(block, hidden, call).square().sum().backward()
    assert hidden.grad is not None and bool(hidden.grad.abs().sum() > 0)


@pytest.mark.parametrize(("count", "length", "width"), [(7, 5, 11), (1, 9, 3), (4, 1, 1)])
@pytest.mark.parametrize("limit", [1, 60, 10_000])
def test_ranges_of_sequences_cover_the_batch(count: int, length: int, width: int, limit: int) -> None:
    ranges = rows_at_once(Batch(torch.zeros(count, length, dtype=torch.int64), None), width, limit)
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(count))
    assert all(stop - start == 1 or (stop - start) * length * width <= limit for start, stop in ranges)
