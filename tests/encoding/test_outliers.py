"""Outliers beside integers: exact values, exact bytes, what they are worth, and the refusal of what does not fit."""

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
from layerwise.encoding.outliers import Outliers, outliers_layout
from layerwise.errors import InputError


def heavy(rows: int = 7, columns: int = 45, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, columns, generator=generator) ** -0.7


def made(weight: Tensor, grid: Grid, count: int) -> Outliers:
    column = weight.abs().topk(count, dim=1).indices
    rest = weight.scatter(1, column, 0)
    fitted = fit_grid(rest, grid)
    return Outliers.of(weight, column, GroupedInteger.from_codes(round_to_grid(rest, fitted), fitted))


@given(
    st.builds(Grid, st.integers(2, 8), st.sampled_from([0, 5, 64]), st.booleans(), st.sampled_from([8, 16])),
    st.integers(1, 6),
    st.integers(1, 50),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_bytes_values_and_restoring(grid: Grid, rows: int, columns: int, count: int, seed: int) -> None:
    weight, count = heavy(rows, columns, seed), min(count, columns)
    form = made(weight, grid, count)
    layout = outliers_layout(grid, rows, columns, count)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in form.tensors().items()} == layout
    assert form.nbytes == layout_bytes(layout) == form.rest.nbytes + 4 * count * rows
    again = restore_form(form.spec(), form.tensors())
    assert torch.equal(again.decode(), form.decode()) and again.spec() == form.spec()
    column = weight.abs().topk(count, dim=1).indices
    assert torch.equal(form.decode().gather(1, column), weight.gather(1, column).half().float())
    others = torch.ones_like(weight).scatter(1, column, 0).bool()
    assert torch.equal(form.decode()[others], form.rest.decode()[others])


def test_rows_and_gathered_rows_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.encoding.encoded.CHUNK_ELEMENTS", 100)
    form = made(heavy(), Grid(3, 16), 2)
    whole, index = form.decode(), torch.tensor([6, 0, 6, 3])
    assert torch.equal(form.decode_rows(2, 5), whole[2:5]) and torch.equal(form.take_rows(index), whole[index])
    x = torch.randn(2, 45, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(form.multiply(x), x @ whole.T)
    with pytest.raises(IndexError):
        form.take_rows(torch.tensor([-1]))


def test_columns_far_to_the_right_are_told_apart() -> None:
    weight = torch.zeros(1, 2**16)
    weight[0, [3, 40_000, 65_535]] = torch.tensor([1.0, 2.0, 3.0])
    form = made(weight, Grid(2, 0), 3)
    assert torch.equal(form.decode(), weight) and torch.equal(form.take_rows(torch.tensor([0])), weight)
    with pytest.raises(InputError, match="65536"):
        Outliers.of(torch.zeros(1, 2**16 + 1), torch.tensor([[0]]), form.rest)


def test_a_few_outliers_are_worth_more_than_smaller_groups() -> None:
    """Ablation: on heavy-tailed weights, taking two of 256 out beats integers that spend the same bytes on scales."""
    weight = heavy(32, 256)
    ours = made(weight, Grid(3, 128), 2)
    fitted = fit_grid(weight, Grid(3, 64), clip=True)
    plain = GroupedInteger.from_codes(round_to_grid(weight, fitted), fitted)
    assert ours.nbytes <= 1.05 * plain.nbytes
    assert float((ours.decode() - weight).square().mean()) < 0.7 * float((plain.decode() - weight).square().mean())


def test_what_cannot_be_kept_is_refused() -> None:
    rest = made(heavy(), Grid(3, 16), 1).rest
    with pytest.raises(ValueError, match="twice"):
        Outliers.of(heavy(), torch.zeros(7, 2, dtype=torch.int64), rest)
    with pytest.raises(InputError, match="float16"):
        Outliers.of(torch.full((7, 45), 1e6), torch.zeros(7, 1, dtype=torch.int64), rest)


def test_a_form_that_does_not_fit_is_refused() -> None:
    form = made(heavy(), Grid(3, 16), 2)
    spec, tensors = form.spec(), form.tensors()
    cases: list[tuple[dict[str, Any], dict[str, Tensor]]] = [
        ({k: v for k, v in spec.items() if k != name}, tensors) for name in spec
    ]
    wrong: dict[str, tuple[Any, ...]] = {
        "shape": (None, [7], [8, 45], [7, 44], [7, 2**17]),
        "layout": (0, 2, True),
        "count": (0, 1, 46, "2", True, None),
        "rest": (None, 3, {}, {"form": "dense"}, {**spec["rest"], "bits": 4}, {**spec["rest"], "shape": [7, 44]}),
    }
    cases += [({**spec, name: value}, tensors) for name, values in wrong.items() for value in values]
    cases += [(spec, {k: t for k, t in tensors.items() if k != suffix}) for suffix in tensors]
    column = tensors["_outlier_column"]
    bad_columns = ([5, 5], [9, 3], [3, 45], [3, 65_535])
    for pair in bad_columns:
        bad = torch.tensor([pair] * 7).to(column.dtype)
        cases.append((spec, {**tensors, "_outlier_column": bad}))
    cases.append((spec, {**tensors, "_outlier_column": column.to(torch.int32)}))
    cases.append((spec, {**tensors, "_outlier_value": torch.full((7, 2), float("inf")).half()}))
    for bad_spec, bad_tensors in cases:
        with pytest.raises(InputError):
            restore_form(bad_spec, bad_tensors)
