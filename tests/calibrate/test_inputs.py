"""The pass that measures inputs as it runs, against stored hidden states, plain products and memory."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import layerwise
from layerwise.calibrate import inputs as module_of_inputs
from layerwise.calibrate.inputs import input_parts, pieces
from layerwise.calibrate.moments import PANEL, Moment
from layerwise.calibrate.observer import observing
from layerwise.calibrate.passes import TABLES, TAIL, Calibration, Part, reached
from layerwise.engine.journal import Journal, identity_of
from layerwise.loss import loss_of_network
from layerwise.network import streaming
from layerwise.network.streaming import Batch, Streamer


def begun(calibration: Calibration, folder: Path) -> Calibration:
    """The same calibration in a fresh work folder, before any pass."""
    journal = Journal(folder, identity_of({"fresh": 1}))
    network = calibration.network
    return Calibration(network, loss_of_network(network, None), calibration.splits, journal, calibration.seed)


def collected(calibration: Calibration, finished: tuple[str, ...] = ()) -> dict[str, Part]:
    return {part.unit: part for part in input_parts(calibration, finished)}


@pytest.fixture
def after_a_forward_pass(tiny_network: Path, sentences: Path, tmp_path: Path) -> Calibration:
    return layerwise.calibrate(
        layerwise.open(tiny_network), sentences, work=tmp_path / "stored", sequences=64, length=32
    )


def test_one_pass_measures_what_two_do(after_a_forward_pass: Calibration, tmp_path: Path) -> None:
    two = collected(after_a_forward_pass)
    fresh = begun(after_a_forward_pass, tmp_path / "fresh")
    one = collected(fresh)
    assert list(one) == list(two) and {TAIL, TABLES} <= set(one)
    for unit, part in two.items():
        assert one[unit].unreached == part.unreached
        for name, fitted in part.sites.items():
            use, other = fitted.fit.uses[0], one[unit].sites[name].fit.uses[0]
            assert torch.equal(use.inputs, other.inputs) and torch.equal(use.absolute_mean, other.absolute_mean)
            assert use.tokens == other.tokens
    for index, boundary in enumerate(after_a_forward_pass.inputs()):
        assert reached(fresh, index)
        assert torch.equal(boundary.read(0), fresh.inputs()[index].read(0))


def test_a_killed_pass_goes_on_where_it_was(after_a_forward_pass: Calibration, tmp_path: Path) -> None:
    whole = collected(after_a_forward_pass)
    fresh = begun(after_a_forward_pass, tmp_path / "fresh")
    first, *later = list(whole)
    parts = input_parts(fresh, ())
    assert next(parts).unit == first
    parts.close()
    rest = collected(fresh, (first,))
    assert list(rest) == later
    for unit in later:
        for name, fitted in whole[unit].sites.items():
            assert torch.equal(fitted.fit.inputs, rest[unit].sites[name].fit.inputs)


def test_a_head_is_not_multiplied_with(tiny_llama: Path, sentences: Path, tmp_path: Path) -> None:
    """Where the head has a matrix of its own, its inputs are those of the network's own forward."""
    network = layerwise.open(tiny_llama).untied()
    calibration = layerwise.calibrate(network, sentences, work=tmp_path / "work", sequences=64, length=32)
    head = next(s for s in network.tree.sites if s.kind == "head")
    found = collected(calibration)[TAIL].sites[head.name].fit
    total, count, given = torch.zeros(head.columns, head.columns), 0, []
    streamer = Streamer(network)
    with torch.inference_mode(), streamer.block(0) as block, streamer.head_of_network() as enter:
        streamer.run_block(block, calibration.inputs()[0].read(0), enter(calibration.splits.all[0], 0)[1])
    with torch.inference_mode(), streamer.tail() as leave:
        hook = network.module.get_submodule(head.name).register_forward_pre_hook(lambda _, x: given.append(x[0]))
        for i, batch in enumerate(calibration.splits.all):
            leave(batch, calibration.inputs()[-1].read(i))
        hook.remove()
    for x in given:
        rows = x.reshape(-1, head.columns)
        total, count = total + rows.T @ rows, count + len(rows)
    assert found.tokens == count
    torch.testing.assert_close(found.inputs, total / count, rtol=1e-4, atol=1e-6)


def test_sums_of_panels_are_those_of_whole_products() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(97, 2 * PANEL + 35, generator=generator) for _ in range(3)]
    moment = Moment(batches[0].shape[1])
    for batch in batches:
        moment.add(batch)
    expected = sum(b.double().T @ b.double() for b in batches)
    total = moment.total().clone()
    assert torch.equal(total, total.T)
    torch.testing.assert_close(total.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(moment.mean(), total.div(3 * 97))


def test_linears_are_handed_over_before_the_next_input_comes() -> None:
    """Linears that are given the same tensor stay together; outputs are not kept."""
    torch.manual_seed(0)
    block = nn.Module()
    block.first, block.second, block.third = nn.Linear(4, 6), nn.Linear(4, 5), nn.Linear(5, 3)
    groups: list[list[str]] = []

    def full() -> None:
        groups.append(list(observer.seen))
        assert all(len(output) == 0 for _, output in observer.seen.values())
        observer.clear()

    x: Tensor = torch.randn(2, 7, 4)
    names = {name: name for name in ("first", "second", "third")}
    with observing(block, names, full=full) as observer:
        block.first(x)
        block.third(block.second(x))
        full()
    assert groups == [["first", "second"], ["third"]]


def test_rows_of_a_table_are_read_once(
    tiny_llama: Path, sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = layerwise.open(tiny_llama)
    calibration = layerwise.calibrate(network, sentences, work=tmp_path / "work", sequences=64, length=32)
    monkeypatch.setattr(streaming, "ROWS_FROM_DISK", 0)
    read: list[int] = []
    original = type(network).read_rows

    def counted(self: object, parameter: str, index: Tensor) -> Tensor:
        read.append(len(index))
        return original(self, parameter, index)  # type: ignore[arg-type]

    monkeypatch.setattr(type(network), "read_rows", counted)
    fresh = begun(calibration, tmp_path / "fresh")
    collected(fresh)
    words = len(torch.cat([b.tokens.flatten() for b in calibration.splits.all]).unique())
    assert sum(read) == words
    for index, boundary in enumerate(calibration.inputs()):
        assert torch.equal(boundary.read(0), fresh.inputs()[index].read(0))

    monkeypatch.setattr(streaming, "ROWS_REMEMBERED", 0)
    read.clear()
    collected(begun(calibration, tmp_path / "again"))
    assert sum(read) > 2 * words


def test_a_uniform_setting_runs_no_forward_pass_of_its_own(
    tiny_llama: Path, sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    original = module_of_inputs._watch_block
    monkeypatch.setattr(module_of_inputs, "_watch_block", lambda *given: (runs.append(given[2]), original(*given))[1])
    monkeypatch.setattr("layerwise.compress.forward", lambda *_: pytest.fail("a second pass"))
    given = {"calibrate": str(sentences), "sequences": 64, "length": 32}
    layerwise.compress(tiny_llama, tmp_path / "out", uniform="gptq:bits=4,group=64", **given)
    assert runs == list(range(len(layerwise.open(tiny_llama).tree.blocks)))


def test_batches_go_in_pieces_and_padded_ones_whole() -> None:
    tokens = torch.zeros(8, 256, dtype=torch.int64)
    assert list(pieces(Batch(tokens, None))) == [(0, 3), (3, 6), (6, 8)]
    assert list(pieces(Batch(tokens, torch.ones_like(tokens)))) == [(0, 8)]
    assert list(pieces(Batch(torch.zeros(2, 4096, dtype=torch.int64), None))) == [(0, 1), (1, 2)]


def test_pieces_measure_what_the_batch_does(
    after_a_forward_pass: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halves(batch: Batch) -> list[tuple[int, int]]:
        count = len(batch.tokens)
        return [(0, count // 2), (count // 2, count)] if count > 1 else [(0, 1)]

    whole = collected(begun(after_a_forward_pass, tmp_path / "whole"))
    monkeypatch.setattr(module_of_inputs, "pieces", halves)
    halved = collected(begun(after_a_forward_pass, tmp_path / "halved"))
    for unit, part in whole.items():
        for name, fitted in part.sites.items():
            torch.testing.assert_close(halved[unit].sites[name].fit.inputs, fitted.fit.inputs, rtol=1e-4, atol=1e-5)
            assert halved[unit].sites[name].fit.tokens == fitted.fit.tokens


def test_sums_of_a_block_are_let_go_of_without_a_collection(after_a_forward_pass: Calibration, tmp_path: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        parts = input_parts(begun(after_a_forward_pass, tmp_path / "fresh"), ())
        part = next(parts)
        moment = weakref.ref(next(iter(part.sites.values())).fit.inputs)
        assert moment() is not None
        del part
        next(parts)
        assert moment() is None
    finally:
        gc.enable()
