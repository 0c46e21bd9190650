"""What a hostile file can say reaches the library only as sizes that fit: anything else is refused, nothing crashes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.encoding.test_sparse import made
from tests.kernels.test_products import codebook, integer, ternary
from tests.kernels.test_trellis import trellis
from torch import Tensor

from layerwise.encoding.encoded import Encoded
from layerwise.encoding.forms import restore_form
from layerwise.encoding.repacked import canonical, packed_matrix, repack
from layerwise.encoding.signed import SignedGrid
from layerwise.errors import InputError
from layerwise.kernels.library import paths, why_absent
from layerwise.kernels.matrix import Canonical, PackedMatrix
from layerwise.kernels.sparse import Kept, SparseMatrix

pytestmark = pytest.mark.skipif(not paths(), reason=f"no compiled kernels here: {why_absent()}")

FORMS = [
    integer(10, 36, 3, 16),
    integer(10, 36, 4, 0, scale_bits=8),
    integer(9, 30, 8, 8, float_zero=True),
    ternary(9, 30, 12, 2),
    codebook(9, 40, "nf4", 8),
    trellis(37, 36, 3, 16),
    trellis(9, 40, 2, 0, 8),
]
SPARSE_FORMS = [
    made(torch.float16, "mask"),
    made(torch.bfloat16, "2:4", 9, 52),
    made(SignedGrid(4, 16), "mask"),
    made(SignedGrid(3, 32, 8), "2:4", 5, 64),
    made(SignedGrid(8, 0), "mask", 6, 33),
    made(SignedGrid(1, 16), "mask", 4, 30),
]
NUMBERS = st.one_of(st.integers(-3, 300), st.sampled_from([2**31, 2**40, 2**62, -(2**63), True, None, "4", 4.0, [3]]))


def damaged(
    form: Encoded,
    spec_changes: list[tuple[int, Any]],
    byte_changes: list[tuple[int, int, int]],
    cut: tuple[int, int],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What ``form`` stores, with numbers and bytes changed and one tensor perhaps cut short."""
    spec = copy.deepcopy(form.spec())
    tensors = {name: tensor.clone() for name, tensor in form.tensors().items()}
    keys, names = sorted(spec), sorted(tensors)
    for place, value in spec_changes:
        spec[keys[place % len(keys)]] = value
    for tensor_number, place, value in byte_changes:
        flat = tensors[names[tensor_number % len(names)]].view(-1).view(torch.uint8)
        flat[place % len(flat)] = value
    if cut[1] < 10:
        name = names[cut[0] % len(names)]
        tensors[name] = tensors[name].flatten()[: cut[1]]
    return spec, tensors


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, len(FORMS) - 1),
    st.lists(st.tuples(st.integers(0, 20), NUMBERS), max_size=3),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 400), st.integers(0, 255)), max_size=4),
    st.tuples(st.integers(0, 5), st.integers(0, 50)),
)
def test_a_damaged_form_is_refused_or_multiplies(
    which: int, spec_changes: list[tuple[int, Any]], byte_changes: list[tuple[int, int, int]], cut: tuple[int, int]
):
    spec, tensors = damaged(FORMS[which], spec_changes, byte_changes, cut)
    try:
        form = restore_form(spec, tensors)
    except InputError:
        return
    matrix = packed_matrix(form)
    if matrix is not None:
        x = torch.ones(2, form.shape[1])
        for path in paths():
            assert matrix.multiply(x, path=path).shape == (2, form.shape[0])
            assert torch.equal(matrix.decode(path), form.decode())


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, len(FORMS) - 1),
    st.dictionaries(
        st.sampled_from(["rows", "columns", "bits", "group", "centre", "planes"]),
        st.one_of(st.integers(-2, 600), st.sampled_from([2**31, 2**40, 2**62, -(2**63)])),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
)
def test_the_library_itself_refuses_what_does_not_fit(which: int, changes: dict[str, int], trits: bool):
    stored = canonical(FORMS[which])
    assert stored is not None
    changed = Canonical(**{**vars(stored), **changes, "trits": stored.trits ^ trits})
    try:
        matrix = PackedMatrix(changed)
    except ValueError:
        return
    if changed.columns < 10_000:
        assert matrix.multiply(torch.ones(1, changed.columns)).shape == (1, changed.rows)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, len(SPARSE_FORMS) - 1),
    st.lists(st.tuples(st.integers(0, 20), NUMBERS | st.sampled_from(["mask", "2:4", "fp16", "bf16"])), max_size=3),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 400), st.integers(0, 255)), max_size=4),
    st.tuples(st.integers(0, 5), st.integers(0, 50)),
)
def test_a_damaged_sparse_form_is_refused_or_multiplies(
    which: int, spec_changes: list[tuple[int, Any]], byte_changes: list[tuple[int, int, int]], cut: tuple[int, int]
):
    spec, tensors = damaged(SPARSE_FORMS[which], spec_changes, byte_changes, cut)
    try:
        form = restore_form(spec, tensors)
    except InputError as refused:
        assert str(refused)
        return
    kernel, dense = repack(form), form.decode()
    if kernel is not None:
        for path in paths():  # a column at a time: what is kept, to the last bit
            assert torch.equal(kernel.multiply(torch.eye(form.shape[1]), path=path).T, dense)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([(1, 1), (3, 16), (5, 45), (2, 64), (0, 8), (4, 0)]),
    st.integers(-20, 20),
    st.sampled_from([torch.bool, torch.uint8, torch.float32, torch.int64]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.uint8, torch.int8]),
    st.sampled_from([-1, 0, 1, 4, 8, 9, 2**40]),
    st.sampled_from([-16, 0, 1, 16, 32, 64, 2**40]),
    st.tuples(st.booleans(), st.integers(0, 4), st.booleans(), st.integers(0, 4)),
    st.integers(0, 99),
)
def test_the_sparse_product_refuses_what_does_not_fit(
    shape: tuple[int, int],
    more: int,
    mask_type: torch.dtype,
    value_type: torch.dtype,
    bits: int,
    group: int,
    grid: tuple[bool, int, bool, int],
    seed: int,
):
    g = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, 2 if mask_type == torch.bool else 9, shape, generator=g).to(mask_type)
    values = torch.randint(0, 100, (max(0, int((mask != 0).sum()) + more * (seed % 2)),), generator=g).to(value_type)
    scale = torch.ones(shape[0], grid[1]) if grid[0] else None
    floor = torch.zeros(shape[0], grid[3]) if grid[2] else None
    try:
        kernel = SparseMatrix(Kept(mask, values, bits, group, scale, floor))
    except ValueError as refused:
        assert str(refused)
        return
    dense = torch.zeros(shape)
    if scale is None:
        dense[mask] = values.float()
    else:
        sign = 2 ** (bits - 1)
        dense[mask] = torch.where(values % (2 * sign) >= sign, -1.0, 1.0) * (values % sign).float()
    for path in paths():
        assert torch.equal(kernel.multiply(torch.eye(shape[1]), path=path).T, dense)
