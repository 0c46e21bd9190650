"""The products of sparse forms against their own decoding: patterns, values, odd shapes, tokens, paths, threads."""

from __future__ import annotations

import pytest
import torch
from tests.encoding.test_sparse import made
from tests.kernels.test_products import normal
from torch import Tensor

from layerwise.encoding.repacked import repack
from layerwise.encoding.signed import SignedGrid, fit_signed, round_signed
from layerwise.encoding.sparse import Sparse
from layerwise.encoding.sums import Sum
from layerwise.kernels.library import paths, why_absent
from layerwise.kernels.sparse import Kept, SparseMatrix

pytestmark = pytest.mark.skipif(not paths(), reason=f"no compiled kernels here: {why_absent()}")

KINDS: dict[str, SignedGrid | torch.dtype] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "1 bit": SignedGrid(1, 16),
    "3 bits": SignedGrid(3, 32),
    "4 bits, 8-bit scales": SignedGrid(4, 16, 8),
    "8 bits, whole rows": SignedGrid(8, 0),
}


def kept_of(rows: int, columns: int, share: float, seed: int = 3) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < share


def sparse(rows: int, columns: int, mask: Tensor, pattern: str, kind: SignedGrid | torch.dtype) -> Sparse:
    weight = normal(rows, columns)
    if isinstance(kind, torch.dtype):
        return Sparse.from_values(weight, mask, pattern, kind)
    fitted = fit_signed(weight, mask, kind)
    return Sparse.from_codes(round_signed(weight, fitted), mask, pattern, fitted)


def check(form: Sparse, tokens: tuple[int, ...] = (1, 3, 13)) -> None:
    kernel, dense = repack(form), form.decode().double()
    assert isinstance(kernel, SparseMatrix)
    for count in tokens:
        x = normal(count, dense.shape[1], seed=count)
        exact, terms = x.double() @ dense.T, x.double().abs() @ dense.abs().T + 1e-30
        found = [kernel.multiply(x, path=path) for path in paths()]
        assert float(((found[0] - exact).abs() / terms).max()) < 1e-5
        assert all(torch.equal(found[0], other) for other in found)
        assert torch.equal(torch.cat([kernel.multiply(row[None]) for row in x]), found[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 4), (5, 16), (18, 45), (33, 200)])
def test_masks(kind: str, shape: tuple[int, int]):
    for share in (0.0, 0.5, 1.0):
        check(sparse(*shape, kept_of(*shape, share), "mask", KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_two_in_four(kind: str):
    fours = torch.rand(21, 13, 4, generator=torch.Generator().manual_seed(5)).argsort(2) < 2
    check(sparse(21, 52, fours.reshape(21, 52), "2:4", KINDS[kind]))


def test_threads_strides_bias_and_other_types():
    kernel = repack(sparse(70, 100, kept_of(70, 100, 0.4), "mask", torch.float16))
    assert kernel is not None and kernel.table
    wide, bias = normal(6, 230), normal(70, seed=9)
    x = wide[:, 7:107]
    expected = kernel.multiply(x.contiguous())
    assert torch.equal(kernel.multiply(x), expected)
    assert torch.equal(kernel.multiply(wide.T.contiguous().T[:, 7:107]), expected)
    assert torch.equal(kernel.multiply(x, bias=bias), expected + bias)
    assert torch.equal(kernel.multiply(x.view(2, 3, 100)), expected.view(2, 3, 70))
    assert torch.equal(kernel.multiply(x.bfloat16()), kernel.multiply(x.bfloat16().float()).bfloat16())
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            assert torch.equal(kernel.multiply(x), expected)
    finally:
        torch.set_num_threads(before)


def test_a_sum_multiplies_its_sparse_part_by_the_kernel():
    first = sparse(24, 64, kept_of(24, 64, 0.5), "mask", torch.float16)
    second = sparse(24, 64, kept_of(24, 64, 0.1, seed=4), "mask", torch.bfloat16)
    form, x = Sum(first, second), normal(3, 64)
    kernel = repack(form)
    assert kernel is not None
    assert torch.allclose(kernel.multiply(x), x @ form.decode().T, atol=1e-4)


def test_what_has_no_kernel_and_what_does_not_fit():
    assert repack(made(SignedGrid(4, 20), "mask")) is None  # a group that is no multiple of sixteen columns
    mask, values = kept_of(4, 20, 0.5), torch.ones(200, dtype=torch.float16)
    kept = int(mask.sum())
    for wrong in (
        Kept(mask, values[: kept - 1]),
        Kept(mask, values[:kept].float()),
        Kept(mask, values[:kept].to(torch.uint8), bits=4),
        Kept(mask, values[:kept], scale=torch.ones(4, 1)),
        Kept(mask, values[:kept].to(torch.uint8), 4, 20, torch.ones(4, 2), torch.ones(4, 2)),
        Kept(mask, values[:kept].to(torch.uint8), 9, 20, torch.ones(4, 1), torch.ones(4, 1)),
    ):
        with pytest.raises(ValueError):
            SparseMatrix(wrong)
    kernel = SparseMatrix(Kept(mask, values[:kept]))
    for x in (normal(1, 19), normal(1, 20, seed=1).to("meta")):
        with pytest.raises(ValueError, match="activations are"):
            kernel.multiply(x)
    with pytest.raises(ValueError, match="int8"):
        kernel.multiply(normal(1, 20), int8=True)
    with pytest.raises(ValueError, match="no path"):
        kernel.multiply(normal(1, 20), path="neon")
