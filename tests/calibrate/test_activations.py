"""Hidden states on disk: what is written is read back, a broken file is never taken for a whole one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from layerwise.calibrate.activations import Boundary

SHAPES = [(2, 3, 4), (1, 5, 4), (3, 1, 4)]


def states() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw) for shape in SHAPES]


def test_every_batch_comes_back(tmp_path: Path) -> None:
    boundary = Boundary(tmp_path / "hidden.bin", SHAPES)
    assert not boundary.complete
    boundary.write(iter(states()))
    assert boundary.complete
    for index in (2, 0, 1):
        assert torch.equal(boundary.read(index), states()[index])


def test_other_layouts_and_types_are_stored_as_plain_float32(tmp_path: Path) -> None:
    boundary = Boundary(tmp_path / "hidden.bin", [(2, 3, 4)])
    turned = torch.arange(24.0).view(4, 3, 2).permute(2, 1, 0)
    boundary.write(iter([turned.half()]))
    assert torch.equal(boundary.read(0), turned)
    assert boundary.path.stat().st_size == 24 * 4


def test_a_prefix_of_the_batches_reads_a_prefix_of_the_file(tmp_path: Path) -> None:
    Boundary(tmp_path / "hidden.bin", SHAPES).write(iter(states()))
    assert torch.equal(Boundary(tmp_path / "hidden.bin", SHAPES[:2]).read(1), states()[1])


def test_a_run_that_dies_leaves_no_boundary(tmp_path: Path) -> None:
    boundary = Boundary(tmp_path / "hidden.bin", SHAPES)

    def dies() -> Iterator[Tensor]:
        yield states()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        boundary.write(dies())
    assert not boundary.path.exists() and not boundary.complete
    boundary.write(iter(states()))
    assert boundary.complete


def test_a_wrong_shape_is_our_mistake(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="batch 0 has shape"):
        Boundary(tmp_path / "hidden.bin", SHAPES).write(iter([torch.zeros(2, 3, 5)]))


def test_a_truncated_file_is_noticed(tmp_path: Path) -> None:
    boundary = Boundary(tmp_path / "hidden.bin", SHAPES)
    boundary.write(iter(states()))
    with boundary.path.open("r+b") as file:
        file.truncate(boundary.path.stat().st_size - 4)
    assert not boundary.complete
    with pytest.raises(OSError, match="shorter"):
        boundary.read(2)


def test_removing_twice_is_no_error(tmp_path: Path) -> None:
    boundary = Boundary(tmp_path / "hidden.bin", SHAPES)
    boundary.write(iter(states()))
    boundary.remove()
    boundary.remove()
    assert not boundary.complete
