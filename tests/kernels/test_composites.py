"""What is made of several products, and rows looked up where they are stored, against the forms' own decoding."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.test_products import codebook, integer, normal, ternary

from layerwise.encoding.dense import Dense
from layerwise.encoding.encoded import Encoded
from layerwise.encoding.lowrank import LowRank
from layerwise.encoding.repacked import packed_table, repack
from layerwise.encoding.sums import Sum
from layerwise.kernels.library import paths, why_absent

pytestmark = pytest.mark.skipif(not paths(), reason=f"no compiled kernels here: {why_absent()}")


def lowrank(rows: int, columns: int, rank: int) -> LowRank:
    return LowRank(integer(rank, rows, 8, 32), integer(rank, columns, 4, 32))


COMPOSITES = {
    "low-rank": lowrank(40, 96, 7),
    "codes and low-rank": Sum(integer(40, 96, 3, 32), lowrank(40, 96, 5)),
    "two kinds of codes": Sum(codebook(40, 96, "nf4", 16), ternary(40, 96, 32, 2)),
}


@pytest.mark.parametrize("name", COMPOSITES)
@pytest.mark.parametrize("tokens", [1, 9])
def test_composites(name: str, tokens: int):
    form = COMPOSITES[name]
    kernel = repack(form)
    assert kernel is not None
    x = normal(tokens, 96)
    exact = x.double() @ form.decode().double().T
    assert float((kernel.multiply(x) - exact).norm() / exact.norm()) < 1e-5
    assert float((kernel.multiply(x, int8=True) - exact).norm() / exact.norm()) < 2e-2
    assert kernel.multiply(x.bfloat16()).dtype == torch.bfloat16


def test_a_part_without_a_kernel_is_multiplied_by_its_reference():
    rest = Dense.of(normal(40, 96, seed=5) / 10, torch.float16)
    form = Sum(integer(40, 96, 4, 32), rest)
    kernel = repack(form)
    assert kernel is not None
    x = normal(2, 96)
    assert torch.allclose(kernel.multiply(x), x @ form.decode().T, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_factors_are_widened_once(dtype: torch.dtype):
    factors = [Dense.of(normal(7, n, seed=n) / 10, torch.float16) for n in (40, 96)]
    form = LowRank(*factors)
    kernel = repack(form)
    assert kernel is not None
    x, bias = normal(9, 96).to(dtype), normal(1, 40, seed=3)[0]
    y = kernel.multiply(x, bias=bias.to(dtype))
    assert y.dtype == dtype
    exact = x.double() @ form.decode().double().T + bias.double()
    assert float((y - exact).norm() / exact.norm()) < (1e-5 if dtype == torch.float32 else 1e-2)


TABLES: dict[str, Encoded] = {
    "3 bits": integer(11, 70, 3, 16),
    "float zeros": integer(11, 70, 4, 32, float_zero=True),
    "8-bit scales": integer(11, 70, 6, 0, scale_bits=8),
    "8-bit float scales": integer(11, 70, 4, 32, scale_bits=8, float_scale=True, symmetric=True),
    "levels": codebook(11, 70, "nf4", 8),
    "planes": ternary(11, 70, 20, 3),
}


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_those_that_the_form_decodes_to(name: str):
    form = TABLES[name]
    table = packed_table(form)
    assert table is not None
    index = torch.tensor([10, 0, 3, 3])
    assert torch.equal(table.take(index), form.take_rows(index))
    assert table.take(index[:0]).shape == (0, 70)
    for wrong in (11, -1):
        with pytest.raises(IndexError):
            table.take(torch.tensor([wrong]))
