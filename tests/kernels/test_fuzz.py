"""What a hostile file can say reaches the library only as sizes that fit: anything else is refused, nothing crashes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.test_products import codebook, integer, ternary

from layerwise.encoding.forms import restore_form
from layerwise.encoding.repacked import canonical, packed_matrix
from layerwise.errors import InputError
from layerwise.kernels.library import paths, why_absent
from layerwise.kernels.matrix import Canonical, PackedMatrix

pytestmark = pytest.mark.skipif(not paths(), reason=f"no compiled kernels here: {why_absent()}")

FORMS = [
    integer(10, 36, 3, 16),
    integer(10, 36, 4, 0, scale_bits=8),
    integer(9, 30, 8, 8, float_zero=True),
    ternary(9, 30, 12, 2),
    codebook(9, 40, "nf4", 8),
]
NUMBERS = st.one_of(st.integers(-3, 300), st.sampled_from([2**31, 2**40, 2**62, -(2**63), True, None, "4", 4.0, [3]]))


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
    spec = copy.deepcopy(FORMS[which].spec())
    tensors = {name: tensor.clone() for name, tensor in FORMS[which].tensors().items()}
    keys, names = sorted(spec), sorted(tensors)
    for place, value in spec_changes:
        spec[keys[place % len(keys)]] = value
    for tensor_number, place, value in byte_changes:
        flat = tensors[names[tensor_number % len(names)]].view(-1).view(torch.uint8)
        flat[place % len(flat)] = value
    if cut[1] < 10:
        name = names[cut[0] % len(names)]
        tensors[name] = tensors[name].flatten()[: cut[1]]
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
