"""Columns in groups of their own widths: exact bytes, exact decoding, one bit, and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.encoding.test_integer import broken

from layerwise.encoding.encoded import layout_bytes
from layerwise.encoding.forms import restore_form
from layerwise.encoding.grid import Grid, fit_grid, round_to_grid
from layerwise.encoding.mixed import Groups, Mixed, group_widths, mixed_layout, pack_runs, unpack_runs
from layerwise.errors import InputError


def random(rows: int, columns: int, size: int, first: int, seed: int = 0) -> Mixed:
    generator = torch.Generator().manual_seed(seed)
    mask = None
    if first:
        mask = torch.zeros(columns, dtype=torch.bool)
        mask[torch.randperm(columns, generator=generator)[:first]] = True
    bits = torch.randint(1, 9, (len(group_widths(columns, size, first)),), generator=generator)
    groups = Groups(columns, size, bits, mask)
    top = 2**bits
    codes = (torch.rand(rows, columns, generator=generator) * top[groups.of]).to(torch.uint8)
    zero = (torch.rand(rows, len(bits), generator=generator) * top).to(torch.uint8)
    scale = (torch.rand(rows, len(bits), generator=generator) + 0.1).half()
    form = Mixed.from_codes(codes, scale, zero, groups)
    assert torch.equal(form.codes(), codes)
    return form


@given(st.integers(1, 6), st.integers(1, 70), st.integers(0, 70), st.floats(0, 0.99), st.integers(0, 99))
def test_what_is_stored_is_what_the_layout_says_and_restores(
    rows: int, columns: int, size: int, share: float, seed: int
) -> None:
    size, first = min(size, columns), int(share * columns)
    form = random(rows, columns, size, first, seed)
    tensors, layout = form.tensors(), mixed_layout(rows, columns, size, first, form.groups.bits.tolist())
    assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == layout
    assert form.nbytes == layout_bytes(layout)
    again = restore_form(form.spec(), tensors)
    assert torch.equal(again.decode(), form.decode()) and again.spec() == form.spec()
    assert all(torch.equal(t, again.tensors()[k]) for k, t in tensors.items())


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 8)), min_size=1, max_size=6), st.integers(0, 99))
def test_runs_of_bits_come_back(runs: list[tuple[int, int]], seed: int) -> None:
    widths, bits = [w for w, _ in runs], torch.tensor([b for _, b in runs])
    top = torch.repeat_interleave(2**bits, torch.tensor(widths))
    codes = (torch.rand(3, len(top), generator=torch.Generator().manual_seed(seed)) * top).to(torch.uint8)
    packed = pack_runs(codes, widths, bits)
    assert packed.shape == (3, -(-sum(w * b for w, b in runs) // 8))
    assert torch.equal(unpack_runs(packed, widths, bits), codes)


def test_decode_is_the_formula_in_the_columns_own_order() -> None:
    form = random(5, 45, 8, 13)
    whole, codes, groups = form.decode(), form.codes(), form.groups
    zeros = unpack_runs(form.zero, [1] * len(groups.bits), groups.bits)
    for place in range(45):
        column, group = int(groups.order[place]), int(groups.of[place])
        zero = zeros[:, group].float() / (2 if groups.bits[group] == 1 else 1)
        expected = (codes[:, place].float() - zero) * form.scale[:, group].float()
        assert torch.equal(whole[:, column], expected)
    first = form.groups.first
    assert first is not None and bool(first[groups.order[:13]].all()) and len(groups.widths) == 2 + 4
    index = torch.tensor([4, 0, 4])
    assert torch.equal(form.take_rows(index), whole[index]) and torch.equal(form.decode_rows(1, 3), whole[1:3])


def test_one_width_is_the_integer_grid() -> None:
    weight = torch.randn(6, 45, generator=torch.Generator().manual_seed(0))
    fitted = fit_grid(weight, Grid(3, 16))
    codes, zero = round_to_grid(weight, fitted), fitted.zero
    assert zero is not None
    form = Mixed.from_codes(codes, fitted.scale, zero, Groups(45, 16, torch.tensor([3, 3, 3])))
    assert torch.equal(form.decode(), (codes.float() - fitted.zeros()[:, torch.arange(45) // 16])
                       * fitted.steps()[:, torch.arange(45) // 16])  # fmt: skip


def test_what_does_not_fit_is_refused() -> None:
    form = random(7, 45, 8, 13)
    spec, tensors = form.spec(), form.tensors()
    cases = broken(form)
    cases += [({k: v for k, v in spec.items() if k != name}, tensors) for name in spec]
    for name, values in {
        "group": (-1, 7, 2.5, "16", None, 46, True),
        "first": (-1, 0, 12, 45, 2.0, None, True),
        "layout": (0, 2, "1", True),
    }.items():
        cases += [({**spec, name: value}, tensors) for value in values]
    cases.append(({**spec, "shape": [7, 2**40], "group": 1}, tensors))
    changes = {"_bits": (0, 0xFF, 0x19), "_first": (0, 0xFF)}
    for suffix, values in changes.items():
        for value in values:
            bad = tensors[suffix].clone()
            bad[0] = value
            if not torch.equal(bad, tensors[suffix]):
                cases.append((spec, {**tensors, suffix: bad}))
    loose = tensors["_first"].clone()
    loose[-1] |= 0x80  # a column that there is not
    cases.append((spec, {**tensors, "_first": loose}))
    for number in (0.0, -1.0, float("nan"), float("inf")):
        scale = tensors["_scale"].clone()
        scale[0, 0] = number
        cases.append((spec, {**tensors, "_scale": scale}))
    for bad_spec, bad_tensors in cases:
        with pytest.raises(InputError):
            restore_form(bad_spec, bad_tensors)
