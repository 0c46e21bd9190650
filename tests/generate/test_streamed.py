"""Blocks from disk: the same bits, two of them in memory, and the next read while one computes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from tests.generate.networks import network, prompts

from layerwise.errors import InputError
from layerwise.generate.streamed import Reader, StreamedBlock, open_streamed, reader_of, resident_blocks, spilled
from layerwise.generate.wanted import Wanted, silent
from layerwise.jobs.generating import open_speaker
from layerwise.recipe import parse_generator


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_scores_have_the_same_bits(kind: str, tmp_path: Path) -> None:
    net, tokens = network(kind), torch.tensor([prompts(1, seed=1)[0]])
    other = spilled(net, tmp_path)
    with torch.inference_mode():
        assert torch.equal(net.session(1, 20).full(tokens), other.session(1, 20).full(tokens))
    reader = reader_of(other)
    assert reader is not None and reader_of(net) is None
    reader.close()


def test_a_checkpoint_is_opened_with_its_blocks_on_disk(docs_lm: Path) -> None:
    streamed, whole = open_speaker(str(docs_lm), streamed=True).network, open_speaker(str(docs_lm)).network
    assert all(isinstance(block, StreamedBlock) for block in streamed.blocks)
    assert all(p.is_meta for block in streamed.blocks for p in block.parameters())
    assert streamed.stop == whole.stop and streamed.longest == whole.longest
    given = [[40, 50, 60], [9, 8]]
    plain = parse_generator("plain").generate(whole, given, Wanted(8), silent)
    for setting, most in (("sora", 2), ("sora:ahead=false", 1), ("sora:memory=5.0", 3), ("sora:memory=100.0", 5)):
        found = parse_generator(setting).generate(streamed, given, Wanted(8), silent)
        assert found.tokens == plain.tokens
        block = reader_of(streamed).sizes[0]  # type: ignore[union-attr]
        assert found.notes["held_bytes"] == most * block and found.notes["block_bytes"] == 5 * block
    assert found.notes["blocks_read"] == 5  # each once, and never again


def reader_that_takes(seconds: float, count: int = 4) -> Reader:
    def read(index: int) -> dict[str, torch.Tensor]:
        time.sleep(seconds)
        return {"value": torch.tensor([index])}

    return Reader(read, [8] * count)


def test_reading_and_computing_overlap() -> None:
    """The ablation: without reading ahead, computing waits for every block."""
    waited = {}
    for ahead in (True, False):
        reader = reader_that_takes(0.01)
        reader.set_up(0, ahead)
        for step in range(12):
            assert int(reader.take(step % 4)["value"]) == step % 4
            time.sleep(0.03)
        waited[ahead] = reader.waited
        assert reader.reads == 12 and reader.held_at_most == (16 if ahead else 8)
        reader.close()
    assert waited[True] < 0.5 * waited[False]


def test_a_block_that_was_not_expected_is_read_all_the_same() -> None:
    reader = reader_that_takes(0.0)
    reader.set_up(1, True)
    assert [int(reader.take(i)["value"]) for i in (0, 3, 1, 1, 2, 0, 2)] == [0, 3, 1, 1, 2, 0, 2]
    assert reader.held_at_most == 24
    reader.close()


def test_a_mistake_of_reading_is_told() -> None:
    def read(index: int) -> dict[str, torch.Tensor]:
        if index == 2:
            raise OSError("the disk is gone")
        return {}

    reader = Reader(read, [1] * 4)
    reader.take(0)
    reader.take(1)
    with pytest.raises(OSError, match="the disk is gone"):
        reader.take(2)
    reader.close()


def test_how_many_blocks_stay() -> None:
    sizes = [1_000_000] * 6
    assert [resident_blocks(sizes, m) for m in (0, 2, 3.5, 5, 6, 99)] == [0, 0, 1, 3, 6, 6]
    with pytest.raises(InputError, match=r"two blocks of this network take 2\.0 MB"):
        resident_blocks(sizes, 1.5)


def test_a_network_without_blocks_to_stream_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        open_streamed(str(tmp_path))
