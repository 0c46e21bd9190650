"""Centred trellises: the formula, single rows, exact bytes, products and look-ups, what is refused."""

from __future__ import annotations

import pytest
import torch
from tests.encoding.test_integer import broken
from tests.encoding.test_trellis import made

from layerwise.encoding.centred import Centred, centred_layout
from layerwise.encoding.forms import restore_form
from layerwise.encoding.repacked import CentredProduct, packed_table, repack
from layerwise.encoding.trellis import trellis_layout
from layerwise.errors import InputError
from layerwise.kernels.library import chosen_path

ROWS, COLUMNS = 45, 48


def centred() -> Centred:
    generator = torch.Generator().manual_seed(7)
    factor = (torch.rand(COLUMNS, generator=generator) + 0.5).half()
    offset = torch.randn(COLUMNS, generator=generator).half()
    return Centred(made(ROWS, COLUMNS, 3)[1], factor, offset)


def test_columns_are_scaled_and_then_moved() -> None:
    form = centred()
    whole = form.part.decode() * form.factor.float() + form.offset.float()
    assert form.shape == (ROWS, COLUMNS) and torch.equal(form.decode(), whole)
    index = torch.tensor([44, 0, 31, 32])
    assert torch.equal(form.take_rows(index), whole[index]) and torch.equal(form.decode_rows(30, 40), whole[30:40])
    x = torch.randn(2, 3, COLUMNS, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(form.multiply(x), x @ whole.T, rtol=1e-5, atol=1e-4)


def test_it_is_restored_bit_for_bit_and_takes_the_bytes_it_says() -> None:
    form = centred()
    assert torch.equal(restore_form(form.spec(), form.tensors()).decode(), form.decode())
    layout = centred_layout(trellis_layout(3, 16, 8, ROWS, COLUMNS), COLUMNS)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in form.tensors().items()} == layout
    assert form.nbytes == form.part.nbytes + 4 * COLUMNS


@pytest.mark.skipif(chosen_path() is None, reason="the kernels are not compiled")
@pytest.mark.parametrize("tokens", [1, 3, 150])
def test_products_and_look_ups_go_through_the_kernels_of_the_part(tokens: int) -> None:
    form, generator = centred(), torch.Generator().manual_seed(tokens)
    x, bias = torch.randn(tokens, COLUMNS, generator=generator), torch.randn(ROWS, generator=generator)
    kernel, table = repack(form), packed_table(form)
    assert isinstance(kernel, CentredProduct) and table is not None
    torch.testing.assert_close(kernel.multiply(x, bias=bias), x @ form.decode().T + bias, rtol=1e-4, atol=1e-3)
    assert kernel.multiply(x.bfloat16()).dtype == torch.bfloat16
    index = torch.arange(ROWS)
    assert torch.equal(table.take(index), form.take_rows(index))


def test_what_does_not_fit_is_refused() -> None:
    form = centred()
    spec, tensors = form.spec(), form.tensors()
    cases = broken(form) + [({k: v for k, v in spec.items() if k != name}, tensors) for name in spec]
    cases += [({**spec, "layout": value}, tensors) for value in (0, 2, "1", True)]
    cases += [({**spec, "part": value}, tensors) for value in (None, {}, "trellis", {"form": "dense"}, spec)]
    cases += [({**spec, "shape": [COLUMNS, ROWS]}, tensors), ({**spec, "shape": [ROWS + 32, COLUMNS]}, tensors)]
    for suffix in ("_factor", "_offset"):
        cases += [
            (spec, {**tensors, suffix: torch.full_like(tensors[suffix], x)}) for x in (float("nan"), float("inf"))
        ]
    cases += [(spec, {**tensors, "_factor": torch.full_like(tensors["_factor"], x)}) for x in (0.0, -1.0)]
    for bad_spec, bad_tensors in cases:
        with pytest.raises(InputError):
            restore_form(bad_spec, bad_tensors)
