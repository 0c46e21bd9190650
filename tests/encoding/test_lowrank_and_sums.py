"""Low-rank forms and sums: exact decoding, both products, and the refusal of anything that does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.encoding.test_integer import broken, encoded
from torch import Tensor

from layerwise.encoding.codebook import Codebook, fit_codebook, nearest_levels
from layerwise.encoding.dense import Dense
from layerwise.encoding.encoded import Encoded, layout_bytes
from layerwise.encoding.forms import restore_form
from layerwise.encoding.grid import Grid
from layerwise.encoding.integer import integer_layout
from layerwise.encoding.lowrank import LowRank, lowrank_layout
from layerwise.encoding.sums import Sum, sum_layout
from layerwise.errors import InputError


def dense(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> Dense:
    return Dense.of(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), dtype)


def codebook(rows: int, columns: int) -> Codebook:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(4))
    fitted = fit_codebook(weight, "nf4", 16, 8)
    return Codebook.from_codes(nearest_levels(weight, "nf4", fitted), "nf4", fitted)


def low_rank(kind: str = "integer") -> LowRank:
    if kind == "integer":
        return LowRank(encoded(Grid(4, 3), 5, 7, seed=1), encoded(Grid(3, 16, scale_bits=8), 5, 45, seed=2))
    if kind == "dense":
        return LowRank(dense(5, 7), dense(5, 45, 1, torch.float32))
    return LowRank(codebook(5, 7), dense(5, 45, 1, torch.bfloat16))


FORMS: dict[str, Any] = {
    "integer factors": low_rank,
    "dense factors": lambda: low_rank("dense"),
    "codebook factor": lambda: low_rank("codebook"),
    "integer + low rank": lambda: Sum(encoded(Grid(2, 16)), low_rank()),
    "low rank + codebook": lambda: Sum(low_rank("dense"), codebook(7, 45)),
    "dense + integer": lambda: Sum(dense(7, 45), encoded(Grid(2, 16, symmetric=True))),
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Encoded:
    made = FORMS[request.param]()
    assert isinstance(made, Encoded)
    return made


def test_what_is_stored_restores_bit_for_bit(form: Encoded) -> None:
    tensors = form.tensors()
    assert tensors[""].dtype == torch.uint8 and tensors[""].dim() == 1
    again = restore_form(form.spec(), tensors)
    assert torch.equal(again.decode(), form.decode()) and again.spec() == form.spec()
    assert all(torch.equal(t, again.tensors()[k]) for k, t in tensors.items())


def test_bytes_that_lie_off_their_boundary_restore_too(form: Encoded) -> None:
    tensors = form.tensors()
    shifted = torch.empty(tensors[""].numel() + 1, dtype=torch.uint8)[1:].copy_(tensors[""])
    assert torch.equal(restore_form(form.spec(), {**tensors, "": shifted}).decode(), form.decode())


def test_rows_gathered_rows_and_products(form: Encoded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.encoding.lowrank.PIECE", 100)
    whole = form.decode()
    assert torch.equal(form.decode_rows(2, 5), whole[2:5])
    index = torch.tensor([6, 0, 6, 3])
    assert torch.equal(form.take_rows(index), whole[index])
    assert form.take_rows(torch.empty(0, dtype=torch.int64)).shape == (0, 45)
    x = torch.randn(2, 3, 45, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(form.multiply(x), x @ whole.T)
    for outside in ([-1], [7]):
        with pytest.raises(IndexError):
            form.take_rows(torch.tensor(outside))


def test_a_low_rank_form_is_the_product_and_a_sum_the_sum() -> None:
    form = low_rank()
    exact = form.left.decode().double().T @ form.right.decode().double()
    torch.testing.assert_close(form.decode().double(), exact, rtol=1e-6, atol=1e-6)
    first = encoded(Grid(2, 16))
    assert torch.equal(Sum(first, form).decode(), first.decode() + form.decode())


def test_bytes_are_those_of_the_parts() -> None:
    form = low_rank()
    assert form.nbytes == form.left.nbytes + form.right.nbytes
    layout = lowrank_layout(integer_layout(Grid(4, 3), 5, 7), integer_layout(Grid(3, 16, scale_bits=8), 5, 45))
    assert {k: (t.dtype, tuple(t.shape)) for k, t in form.tensors().items()} == layout
    both = Sum(encoded(Grid(2, 16)), form)
    assert both.nbytes == encoded(Grid(2, 16)).nbytes + form.nbytes
    expected = sum_layout(integer_layout(Grid(2, 16), 7, 45), layout)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in both.tensors().items()} == expected
    assert layout_bytes(expected) == both.nbytes


def test_what_does_not_fit_is_refused(form: Encoded) -> None:
    spec, tensors = form.spec(), form.tensors()
    cases = broken(form)
    names = ("left", "right") if spec["form"] == "lowrank" else ("first", "second")
    for name in names:
        inner = spec[name]
        cases += [({**spec, name: value}, tensors) for value in (None, 3, [], {}, {"form": []}, spec)]
        cases += [({**spec, name: {**inner, "shape": value}}, tensors) for value in (None, [5, 46], [2**62, 2])]
        cases += [({**spec, name: {k: v for k, v in inner.items() if k != gone}}, tensors) for gone in inner]
    if spec["form"] == "lowrank":
        cases += [({**spec, "rank": value}, tensors) for value in (None, 0, 4, 6, "5", True, 5.0)]
    cases += [(spec, {**tensors, f"_{names[0]}": torch.ones(1)}), (spec, {**tensors, "_other": torch.ones(1)})]
    for bad_spec, bad_tensors in cases:
        with pytest.raises(InputError):
            restore_form(bad_spec, bad_tensors)


def test_a_sum_of_sums_is_refused() -> None:
    inner = Sum(dense(7, 45), dense(7, 45, 1))
    with pytest.raises(InputError, match="cannot be a sum"):
        Sum(inner, dense(7, 45))
    deep: dict[str, Any] = inner.spec()
    for _ in range(2000):
        deep = {**inner.spec(), "first": deep}
    with pytest.raises(InputError):
        restore_form(deep, inner.tensors())


def test_parts_of_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="share their rank"):
        LowRank(dense(4, 7), dense(5, 45))
    with pytest.raises(InputError, match="one shape"):
        Sum(dense(4, 7), dense(7, 4))


def test_the_rank_adds_in_float32_in_its_own_order() -> None:
    left, right = dense(3, 2, dtype=torch.float32), dense(3, 4, 1, torch.float32)
    found, a, b = LowRank(left, right).decode(), left.decode(), right.decode()
    expected = (a[0, 1] * b[0, 2] + a[1, 1] * b[1, 2]) + a[2, 1] * b[2, 2]
    assert isinstance(expected, Tensor) and found[1, 2] == expected
