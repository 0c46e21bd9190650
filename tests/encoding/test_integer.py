"""The stored forms: exact bytes, exact decoding, and the refusal of anything that does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerwise.encoding.dense import Dense, dense_layout
from layerwise.encoding.encoded import Encoded, layout_bytes
from layerwise.encoding.forms import restore_form
from layerwise.encoding.grid import Grid, fit_grid, round_to_grid
from layerwise.encoding.integer import GroupedInteger, integer_layout
from layerwise.errors import InputError


def encoded(grid: Grid, rows: int = 7, columns: int = 45, seed: int = 0) -> GroupedInteger:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    fitted = fit_grid(weight, grid)
    return GroupedInteger.from_codes(round_to_grid(weight, fitted), fitted)


grids = st.builds(
    Grid, st.integers(2, 8), st.sampled_from([0, 1, 5, 16, 64]), st.just(False), st.sampled_from([8, 16]), st.booleans()
) | st.builds(Grid, st.integers(2, 8), st.sampled_from([0, 5, 64]), st.just(True), st.sampled_from([8, 16]))


@given(grids, st.integers(1, 9), st.integers(1, 70), st.integers(0, 99))
def test_what_is_stored_is_what_the_layout_says_and_restores(grid: Grid, rows: int, columns: int, seed: int) -> None:
    form = encoded(grid, rows, columns, seed)
    tensors, layout = form.tensors(), integer_layout(grid, rows, columns)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == layout
    assert form.nbytes == layout_bytes(layout)
    again = restore_form(form.spec(), tensors)
    assert torch.equal(again.decode(), form.decode())
    assert again.spec() == form.spec()


def test_bits_per_weight_of_the_card() -> None:
    cards = {Grid(4, 128): 4.15625, Grid(4, 64): 4.3125, Grid(3, 64): 3.296875, Grid(4, 64, float_zero=True): 4.5}
    for grid, expected in cards.items():
        assert layout_bytes(integer_layout(grid, 64, 1024)) * 8 / (64 * 1024) == expected
    assert layout_bytes(integer_layout(Grid(4, 64, symmetric=True), 64, 1024)) * 8 / (64 * 1024) == 4.25
    assert layout_bytes(integer_layout(Grid(4, 64, scale_bits=8), 64, 1024)) * 8 / (64 * 1024) == 4.1875 + 16 / 1024


def test_decode_is_the_formula_in_float32() -> None:
    form = encoded(Grid(3, 16))
    codes, steps, zeros = form.codes(), form.fitted.steps(), form.fitted.zeros()
    for row, column in ((0, 0), (3, 17), (6, 44)):
        expected = (codes[row, column].float() - zeros[row, column // 16]) * steps[row, column // 16]
        assert form.decode()[row, column] == expected


@pytest.mark.parametrize("grid", [Grid(3, 16), Grid(4, 16, scale_bits=8), Grid(5, 0, symmetric=True)], ids=str)
def test_rows_and_gathered_rows_are_those_of_the_whole(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.encoding.encoded.CHUNK_ELEMENTS", 100)
    form = encoded(grid)
    whole = form.decode()
    assert torch.equal(form.decode_rows(2, 5), whole[2:5])
    index = torch.tensor([6, 0, 6, 3])
    assert torch.equal(form.take_rows(index), whole[index])
    assert form.take_rows(torch.empty(0, dtype=torch.int64)).shape == (0, 45)
    x = torch.randn(2, 3, 45, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(form.multiply(x), x @ whole.T)


@pytest.mark.parametrize("index", [[-1], [7], [0, 100]])
def test_row_numbers_outside_are_refused(index: list[int]) -> None:
    for form in (encoded(Grid(4)), Dense.of(torch.ones(7, 2), torch.float16)):
        with pytest.raises(IndexError):
            form.take_rows(torch.tensor(index))


# ---------------------------------------------------------------- hostile input


def broken(form: Encoded) -> list[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Descriptions and tensors that do not fit, one fault each."""
    spec, tensors = form.spec(), form.tensors()
    shapes = [None, [7], [7, -45], [7, 0], [7.0, 45], [True, 45], "745", [45, 7], [8, 45], [7, 60], [2**62, 2**62]]
    cases = [({**spec, "shape": value}, tensors) for value in shapes]
    cases += [({**spec, "form": value}, tensors) for value in (None, 3, "integr", [])]
    cases += [(spec, {**tensors, "_extra": torch.ones(1)}), (spec, {k: t for k, t in tensors.items() if k}), (spec, {})]
    for suffix, tensor in tensors.items():
        cases.append((spec, {**tensors, suffix: tensor.to(torch.float64)}))
        cases.append((spec, {**tensors, suffix: tensor[None]}))
        cases.append((spec, {**tensors, suffix: tensor[:-1]}))
    return cases


def test_an_integer_form_that_does_not_fit_is_refused() -> None:
    form = encoded(Grid(3, 16, scale_bits=8))
    spec, tensors = form.spec(), form.tensors()
    cases = broken(form)
    cases += [({k: v for k, v in spec.items() if k != name}, tensors) for name in spec]
    for name, values in {
        "bits": (1, 9, 4, "3", 3.0, True, None),
        "group": (-1, 8, 2.5, "16", None),
        "symmetric": (True, 0, None),
        "scale_bits": (16, 4, True, None),
        "float_zero": (True, 1, None),
        "layout": (0, 2, "1", True),
    }.items():
        cases += [({**spec, name: value}, tensors) for value in values]
    cases.append((spec, {**tensors, "_scale": torch.zeros_like(tensors["_scale"])}))
    for value in (float("nan"), float("inf"), 0.0, -1.0):
        cases.append((spec, {**tensors, "_scale_factor": torch.full((7,), value).half()}))
    for bad_spec, bad_tensors in cases:
        with pytest.raises(InputError):
            restore_form(bad_spec, bad_tensors)


def test_a_float_zero_must_be_finite() -> None:
    form = encoded(Grid(3, 16, float_zero=True))
    zero = form.tensors()["_zero"].clone()
    zero[0, 0] = float("nan")
    with pytest.raises(InputError, match="_zero"):
        restore_form(form.spec(), {**form.tensors(), "_zero": zero})


# ---------------------------------------------------------------- dense


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dense_stores_what_it_is_given(dtype: torch.dtype) -> None:
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    form = Dense.of(weight, dtype)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in form.tensors().items()} == dense_layout(5, 9, dtype)
    assert form.nbytes == 45 * dtype.itemsize
    again = restore_form(form.spec(), form.tensors())
    assert torch.equal(again.decode(), weight.to(dtype).float())
    assert torch.equal(again.take_rows(torch.tensor([4, 1])), again.decode()[[4, 1]])
    for bad_spec, bad_tensors in broken(form):
        with pytest.raises(InputError):
            restore_form(bad_spec, bad_tensors)
    with pytest.raises(InputError):
        restore_form({**form.spec(), "dtype": "int8"}, form.tensors())


def test_dense_refuses_what_its_type_cannot_hold() -> None:
    with pytest.raises(InputError, match="float16 cannot hold"):
        Dense.of(torch.full((2, 2), 1e5), torch.float16)


def test_a_form_does_not_share_memory_with_the_weight() -> None:
    weight = torch.ones(2, 3)
    form = Dense.of(weight, torch.float32)
    form.decode().zero_()
    weight.zero_()
    assert bool((form.decode() == 1).all())
