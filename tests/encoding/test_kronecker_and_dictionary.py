"""Sums of Kronecker products and dictionaries: exact decoding, the product, and the refusal of what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.encoding.test_integer import broken, encoded
from tests.encoding.test_lowrank_and_sums import dense
from torch import Tensor

from layerwise.encoding.dictionary import Dictionary, dictionary_layout, place_bits
from layerwise.encoding.encoded import Encoded
from layerwise.encoding.forms import restore_form
from layerwise.encoding.grid import Grid
from layerwise.encoding.integer import integer_layout
from layerwise.encoding.kronecker import Kronecker, kronecker_layout
from layerwise.errors import InputError


def places(rows: int, blocks: int, kept: int, atoms: int) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    chosen = torch.stack([torch.randperm(atoms, generator=generator)[:kept] for _ in range(rows * blocks)])
    return chosen.sort(1).values.view(rows, blocks * kept)


FORMS: dict[str, Any] = {
    "kronecker, integer blocks": lambda: Kronecker(encoded(Grid(3, 16), 7, 30), dense(9, 2, dtype=torch.float32), 3),
    "kronecker, dense blocks": lambda: Kronecker(dense(5, 14), dense(4, 3, 1), 2),
    "dictionary, integers": lambda: Dictionary.of(
        encoded(Grid(4, 0, symmetric=True), 9, 12), places(9, 4, 3, 6), encoded(Grid(8, 5), 6, 17, 1), 5
    ),
    "dictionary, fp16": lambda: Dictionary.of(dense(9, 4), places(9, 2, 2, 20), dense(20, 16, 1), 8),
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
    assert torch.equal(again.decode(), form.decode()) and again.spec() == form.spec() and again.shape == form.shape
    assert all(torch.equal(t, again.tensors()[k]) for k, t in tensors.items())


def test_rows_gathered_rows_and_products(form: Encoded) -> None:
    whole, (rows, columns) = form.decode(), form.shape
    assert whole.shape == form.shape
    assert torch.equal(form.decode_rows(2, rows - 1), whole[2 : rows - 1])
    index = torch.tensor([rows - 1, 0, rows - 1, 3])
    assert torch.equal(form.take_rows(index), whole[index])
    assert form.take_rows(torch.empty(0, dtype=torch.int64)).shape == (0, columns)
    x = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(form.multiply(x), x @ whole.T)
    for outside in ([-1], [rows]):
        with pytest.raises(IndexError):
            form.take_rows(torch.tensor(outside))


def test_a_dictionary_is_sparse_coefficients_times_atoms() -> None:
    form = FORMS["dictionary, integers"]()
    atoms, values = form.atoms.decode().double(), form.coefficients.decode().double().view(9, 4, 3)
    chosen = places(9, 4, 3, 6).view(9, 4, 3)
    expected = torch.zeros(9, 17, dtype=torch.float64)
    for b in range(4):
        columns = slice(5 * b, min(5 * b + 5, 17))
        codes = torch.zeros(9, 6, dtype=torch.float64).scatter_(1, chosen[:, b], values[:, b])
        expected[:, columns] = codes @ atoms[:, columns]
    torch.testing.assert_close(form.decode().double(), expected, rtol=1e-6, atol=1e-6)


def test_bytes_are_those_of_the_parts_and_the_places() -> None:
    form = FORMS["dictionary, integers"]()
    assert form.nbytes == form.coefficients.nbytes + form.atoms.nbytes + 9 * 5  # 12 places of 2 + 1 bits: 3 + 2 bytes
    parts = integer_layout(Grid(4, 0, symmetric=True), 9, 12), integer_layout(Grid(8, 5), 6, 17)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in form.tensors().items()} == dictionary_layout(*parts, 9, 6, 12)
    assert [place_bits(atoms) for atoms in (1, 2, 3, 16, 17, 256)] == [1, 1, 2, 4, 5, 8]
    mixed = FORMS["kronecker, integer blocks"]()
    layout = kronecker_layout(integer_layout(Grid(3, 16), 7, 30), {"": (torch.float32, (9, 2))})
    assert {k: (t.dtype, tuple(t.shape)) for k, t in mixed.tensors().items()} == layout
    assert mixed.nbytes == mixed.blocks.nbytes + 9 * 2 * 4


def test_what_does_not_fit_is_refused(form: Encoded) -> None:
    spec, tensors = form.spec(), form.tensors()
    names = ("blocks", "mixers") if spec["form"] == "kronecker" else ("coefficients", "atoms")
    cases = broken(form)
    for name in names:
        inner = spec[name]
        cases += [({**spec, name: value}, tensors) for value in (None, 3, [], {}, {"form": []}, spec)]
        cases += [({**spec, name: {**inner, "shape": value}}, tensors) for value in (None, [5, 46], [2**62, 2])]
        cases += [({**spec, name: {k: v for k, v in inner.items() if k != gone}}, tensors) for gone in inner]
    for key, values in (("terms", (None, 0, 4, 7, "2", True, 2.0)), ("block", (None, 0, 3, 18, "5", True, 5.0))):
        cases += [({**spec, key: value}, tensors) for value in values if key in spec]
    cases += [(spec, {**tensors, f"_{names[0]}": torch.ones(1)}), (spec, {**tensors, "_other": torch.ones(1)})]
    if "_place" in tensors:
        same = torch.zeros_like(tensors["_place"])
        cases += [(spec, {**tensors, "_place": same}), (spec, {**tensors, "_place": same + 255})]
        cases += [(spec, {k: t for k, t in tensors.items() if k != "_place"})]
    for bad_spec, bad_tensors in cases:
        with pytest.raises(InputError):
            restore_form(bad_spec, bad_tensors)
