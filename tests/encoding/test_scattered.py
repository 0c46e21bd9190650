"""Kept entries anywhere beside integers: exact values, exact bytes, and the refusal of what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerwise.encoding.encoded import layout_bytes
from layerwise.encoding.forms import restore_form
from layerwise.encoding.grid import Grid, fit_grid, round_to_grid
from layerwise.encoding.integer import GroupedInteger
from layerwise.encoding.scattered import Scattered, scattered_layout
from layerwise.errors import InputError


def heavy(rows: int = 7, columns: int = 45, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, columns, generator=generator) ** -0.7


def largest(weight: Tensor, count: int) -> Tensor:
    kept = torch.zeros(weight.numel(), dtype=torch.bool)
    kept[weight.abs().flatten().topk(count).indices] = True
    return kept.view(weight.shape)


def made(weight: Tensor, grid: Grid, kept: Tensor) -> Scattered:
    rest = weight.masked_fill(kept, 0)
    fitted = fit_grid(rest, grid)
    return Scattered.of(weight, kept, GroupedInteger.from_codes(round_to_grid(rest, fitted), fitted))


@given(
    st.builds(Grid, st.integers(2, 8), st.sampled_from([0, 5, 64]), st.booleans(), st.sampled_from([8, 16])),
    st.integers(1, 6),
    st.integers(1, 50),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_bytes_values_and_restoring(grid: Grid, rows: int, columns: int, share: float, seed: int) -> None:
    weight, count = heavy(rows, columns, seed), max(1, round(share * rows * columns))
    kept = largest(weight, count)
    form = made(weight, grid, kept)
    layout = scattered_layout(grid, rows, columns, count)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in form.tensors().items()} == layout
    assert form.nbytes == layout_bytes(layout) == form.rest.nbytes + 4 * count + 2 * rows
    again = restore_form(form.spec(), form.tensors())
    assert torch.equal(again.decode(), form.decode()) and again.spec() == form.spec()
    assert all(torch.equal(a, b) for a, b in zip(again.tensors().values(), form.tensors().values(), strict=True))
    assert torch.equal(form.decode()[kept], weight[kept].half().float())
    assert torch.equal(form.decode()[~kept], form.rest.decode()[~kept])


def test_rows_and_gathered_rows_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.encoding.encoded.CHUNK_ELEMENTS", 100)
    kept = largest(heavy(), 20)
    kept[2], kept[5] = False, True  # a row of which nothing is kept, and one of which everything is
    form = made(heavy(), Grid(3, 16), kept)
    whole, index = form.decode(), torch.tensor([6, 0, 5, 2, 5, 3])
    assert torch.equal(form.decode_rows(2, 6), whole[2:6]) and torch.equal(form.take_rows(index), whole[index])
    x = torch.randn(2, 45, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(form.multiply(x), x @ whole.T)
    with pytest.raises(IndexError):
        form.take_rows(torch.tensor([-1]))


def test_columns_far_to_the_right_are_told_apart() -> None:
    weight = torch.zeros(1, 2**16 - 1)
    weight[0, [3, 40_000, 65_534]] = torch.tensor([1.0, 2.0, 3.0])
    form = made(weight, Grid(2, 0), weight != 0)
    assert torch.equal(form.decode(), weight) and torch.equal(form.take_rows(torch.tensor([0])), weight)
    full = made(weight, Grid(2, 0), torch.ones_like(weight, dtype=torch.bool))
    assert torch.equal(restore_form(full.spec(), full.tensors()).decode(), weight)
    with pytest.raises(InputError, match="65536"):
        Scattered.of(torch.zeros(1, 2**16), torch.ones(1, 2**16, dtype=torch.bool), form.rest)


def test_what_cannot_be_kept_is_refused() -> None:
    rest = made(heavy(), Grid(3, 16), largest(heavy(), 3)).rest
    with pytest.raises(InputError, match="integer"):
        Scattered.of(heavy(), torch.zeros(7, 45, dtype=torch.bool), rest)
    with pytest.raises(InputError, match="float16"):
        Scattered.of(torch.full((7, 45), 1e6), torch.ones(7, 45, dtype=torch.bool), rest)


def test_a_form_that_does_not_fit_is_refused() -> None:
    kept = torch.zeros(7, 45, dtype=torch.bool)
    kept[0, [3, 9]], kept[4, [0, 7, 44]] = True, True
    form = made(heavy(), Grid(3, 16), kept)
    spec, tensors = form.spec(), form.tensors()
    cases: list[tuple[dict[str, Any], dict[str, Tensor]]] = [
        ({k: v for k, v in spec.items() if k != name}, tensors) for name in spec
    ]
    wrong: dict[str, tuple[Any, ...]] = {
        "shape": (None, [7], [8, 45], [7, 44], [7, 2**17]),
        "layout": (0, 2, True),
        "count": (0, 4, 6, 316, 2**60, "5", True, None),
        "rest": (None, 3, {}, {"form": "dense"}, {**spec["rest"], "bits": 4}, {**spec["rest"], "shape": [7, 44]}),
    }
    cases += [({**spec, name: value}, tensors) for name, values in wrong.items() for value in values]
    cases += [(spec, {k: t for k, t in tensors.items() if k != suffix}) for suffix in tensors]
    for bad_columns in ([3, 3, 0, 7, 44], [9, 3, 0, 7, 44], [3, 9, 0, 7, 45], [3, 9, 0, 7, 65_535]):
        cases.append((spec, {**tensors, "_kept_column": torch.tensor(bad_columns).to(torch.uint16)}))
    for bad_counts in ([2, 0, 0, 0, 4, 0, 0], [2, 0, 0, 0, 2, 0, 0], [1, 1, 0, 0, 46, 0, 0], [4, 0, 0, 0, 1, 0, 0]):
        cases.append((spec, {**tensors, "_kept_count": torch.tensor(bad_counts).to(torch.uint16)}))
    cases.append((spec, {**tensors, "_kept_column": tensors["_kept_column"].to(torch.int32)}))
    cases.append((spec, {**tensors, "_kept_value": torch.full((5,), float("inf")).half()}))
    for bad_spec, bad_tensors in cases:
        with pytest.raises(InputError):
            restore_form(bad_spec, bad_tensors)
