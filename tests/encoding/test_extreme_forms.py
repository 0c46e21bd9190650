"""Ternary, binary, split and power forms: packing, exact bytes, restoring, and the refusal of what does not fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.encoding.test_integer import broken
from torch import Tensor

from layerwise.encoding.binary import Binary, binary_layout
from layerwise.encoding.encoded import Encoded, layout_bytes
from layerwise.encoding.forms import restore_form
from layerwise.encoding.grid import Grid, fit_grid, round_to_grid
from layerwise.encoding.integer import GroupedInteger, integer_layout
from layerwise.encoding.power import Power, levels_of, power_layout
from layerwise.encoding.scales import Scales, groups_of
from layerwise.encoding.split import Split, split_layout
from layerwise.encoding.ternary import Ternary, ternary_layout
from layerwise.encoding.trits import check_trits, pack_trits, unpack_trits
from layerwise.errors import InputError


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes(top: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, top + 1, shape, generator=seeded(seed), dtype=torch.uint8)


def scales(rows: int, count: int, bits: int, seed: int = 1) -> Scales:
    return Scales.of(torch.rand(rows, count, generator=seeded(seed)), bits)


def ternary(rows: int = 7, columns: int = 45, planes: int = 2, group: int = 16, bits: int = 8) -> Ternary:
    steps = scales(rows, planes * groups_of(group, columns), bits)
    return Ternary.from_codes(codes(2, rows, planes, columns), group, steps)


def binary(rows: int = 7, columns: int = 45, group: int = 16, bits: int = 8, centred: bool = True) -> Binary:
    mean = torch.randn(rows, generator=seeded(2)).half() if centred else None
    return Binary.from_codes(codes(1, rows, columns), group, scales(rows, groups_of(group, columns), bits), mean)


def power(rows: int = 7, columns: int = 45, bits: int = 3, group: int = 16, by_row: bool = True) -> Power:
    exponent = codes(30, rows if by_row else 1) + 10
    steps = scales(rows, groups_of(group, columns), 8)
    return Power.from_codes(codes(2**bits - 2, rows, columns), bits, group, steps, exponent)


def split(rows: int = 7, columns: int = 45, kept: int = 9, factors: bool = True) -> Split:
    mask = torch.zeros(columns, dtype=torch.bool)
    mask[torch.randperm(columns, generator=seeded(3))[:kept]] = True
    weight = torch.randn(rows, kept, generator=seeded(4))
    fitted = fit_grid(weight, Grid(4, 0))
    first = GroupedInteger.from_codes(round_to_grid(weight, fitted), fitted)
    factor = (torch.rand(columns - kept, generator=seeded(5)) + 0.5).half() if factors else None
    return Split(first, binary(rows, columns - kept, 0, 16), mask, factor)


FORMS: dict[str, Callable[[], Encoded]] = {"ternary": ternary, "binary": binary, "power": power, "split": split}


def test_every_byte_of_five_trits_packs_and_unpacks() -> None:
    every = torch.tensor(list(itertools.product(range(3), repeat=5)), dtype=torch.uint8)  # [243, 5]
    packed = pack_trits(every)
    assert packed.unique().numel() == 243
    assert torch.equal(unpack_trits(packed, 5), every)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 99))
def test_trits_of_any_width_come_back_in_the_fewest_bytes(rows: int, columns: int, seed: int) -> None:
    trits = codes(2, rows, columns, seed=seed)
    packed = pack_trits(trits)
    check_trits(packed, columns)
    assert packed.shape == (rows, -(-columns // 5)) and torch.equal(unpack_trits(packed, columns), trits)


def test_a_byte_that_no_trits_make_and_a_filled_spare_place_are_refused() -> None:
    packed = pack_trits(codes(2, 2, 7))
    written = set(
        pack_trits(torch.tensor(list(itertools.product(range(3), repeat=5)), dtype=torch.uint8)).flatten().tolist()
    )
    packed[1, 0] = min(set(range(256)) - written)
    with pytest.raises(InputError, match="243"):
        check_trits(packed, 7)
    with pytest.raises(InputError, match="behind the last column"):
        check_trits(pack_trits(torch.zeros(1, 10, dtype=torch.uint8)), 7)


@given(
    st.integers(1, 5), st.integers(1, 40), st.integers(1, 4), st.sampled_from([0, 1, 5, 16]), st.sampled_from([8, 16])
)
def test_ternary_bytes_and_restoring(rows: int, columns: int, planes: int, group: int, bits: int) -> None:
    returns(ternary(rows, columns, planes, group, bits), ternary_layout(planes, group, bits, rows, columns))


@given(st.integers(1, 5), st.integers(1, 40), st.sampled_from([0, 1, 5, 16]), st.sampled_from([8, 16]), st.booleans())
def test_binary_bytes_and_restoring(rows: int, columns: int, group: int, bits: int, centred: bool) -> None:
    returns(binary(rows, columns, group, bits, centred), binary_layout(group, bits, centred, rows, columns))


@given(st.integers(1, 5), st.integers(1, 40), st.integers(2, 8), st.sampled_from([0, 5, 16]), st.booleans())
def test_power_bytes_and_restoring(rows: int, columns: int, bits: int, group: int, by_row: bool) -> None:
    form = power(rows, columns, bits, group, by_row)
    returns(form, power_layout(bits, group, 8, by_row, rows, columns))


@given(st.integers(1, 5), st.integers(2, 40), st.booleans())
def test_split_bytes_and_restoring(rows: int, columns: int, factors: bool) -> None:
    kept = max(1, columns // 3)
    first, second = integer_layout(Grid(4, 0), rows, kept), binary_layout(0, 16, True, rows, columns - kept)
    returns(split(rows, columns, kept, factors), split_layout(first, second, columns, columns - kept, factors))


def returns(form: Encoded, layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    tensors = form.tensors()
    assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == layout
    assert form.nbytes == layout_bytes(layout)
    again = restore_form(form.spec(), tensors)
    assert torch.equal(again.decode(), form.decode()) and again.spec() == form.spec()


def test_bits_per_weight_of_the_cards() -> None:
    """Over 4096 x 4096, every stored byte counted."""

    def bpw(layout: dict[str, tuple[torch.dtype, tuple[int, ...]]], rows: int = 4096, columns: int = 4096) -> float:
        return 8 * layout_bytes(layout) / (rows * columns)

    assert bpw(ternary_layout(2, 128, 16, 4096, 4096)) == pytest.approx(3.45, abs=5e-3)
    assert bpw(ternary_layout(1, 128, 16, 4096, 4096)) == pytest.approx(1.725, abs=3e-3)
    assert bpw(binary_layout(0, 16, False, 4096, 4096)) == pytest.approx(1 + 16 / 4096)
    kept = round(0.2 * 4096)
    parts = integer_layout(Grid(4, 0), 4096, kept), binary_layout(0, 16, True, 4096, 4096 - kept)
    mask, codes_only = 1 / 4096, 0.2 * 4 + 0.8
    rows = 52 / 4096 + 4 / 4096  # range of the salient (the zero's nibble ends on a byte), scale and mean
    assert bpw(split_layout(*parts, 4096, 4096 - kept, True)) == pytest.approx(
        codes_only + mask + rows + 0.8 * 16 / 4096, abs=2e-3
    )


def test_ternary_decodes_to_its_formula_and_planes_add_up() -> None:
    form = ternary()
    trits, steps = form.codes().float() - 1, form.scales.values().view(7, 2, -1)
    for i, j in ((0, 0), (3, 17), (6, 44)):
        expected = trits[i, 0, j] * steps[i, 0, j // 16] + trits[i, 1, j] * steps[i, 1, j // 16]
        assert form.decode()[i, j] == expected
    x = torch.randn(3, 45, generator=seeded(9)).double()
    by_planes = sum(
        (x[:, g * 16 : g * 16 + 16] @ trits[:, p, g * 16 : g * 16 + 16].double().T) * steps[:, p, g].double()
        for p in range(2)
        for g in range(3)
    )
    torch.testing.assert_close(by_planes, x @ form.decode().double().T, rtol=1e-6, atol=1e-6)


def test_products_of_power_levels_are_levels_of_products() -> None:
    for place in (16, 32, 40, 64):
        levels, most, a = levels_of(5)[place - 1].double(), 15, place / 64
        for c, d in ((3, 7), (15, 2), (1, 1)):
            value = (c * d / most**2) ** (1 / a)
            assert float(levels[most + c] * levels[most - d]) == pytest.approx(-value, rel=1e-6)
    assert torch.equal(levels_of(4)[63, :15], (torch.arange(-7, 8).double() / 7).float())
    assert bool((levels_of(4)[:, :15].diff() >= 0).all())


def test_the_correction_folds_into_rows_and_inputs() -> None:
    """``(r1 r2^T * C) x == r1 (C (r2 x))``: what ``multiply`` computes is what ``decode`` says."""
    form = split()
    x = torch.randn(4, 45, generator=seeded(8)).double()
    torch.testing.assert_close(form.multiply(x), x @ form.decode().double().T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", FORMS)
def test_rows_and_gathered_rows_are_those_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.encoding.encoded.CHUNK_ELEMENTS", 100)
    form = FORMS[kind]()
    whole, index = form.decode(), torch.tensor([6, 0, 6, 3])
    assert torch.equal(form.decode_rows(2, 5), whole[2:5]) and torch.equal(form.take_rows(index), whole[index])
    with pytest.raises(IndexError):
        form.take_rows(torch.tensor([7]))


WRONG: dict[str, dict[str, tuple[object, ...]]] = {
    "ternary": {"planes": (0, 1, 5, "2", True, None), "group": (-1, 8, 2.5, "16"), "scale_bits": (16, 4, True)},
    "binary": {"centred": (False, 1, None), "group": (-1, 8, 2.5, "16"), "scale_bits": (16, 4, True)},
    "power": {"bits": (1, 9, 4, "3", True), "exponents": (0, 1, 8, "7", True), "group": (-1, 8), "scale_bits": (16,)},
    "split": {"factors": (False, 1, None), "first": (None, {}, {"form": "sum"}), "second": (None, "binary")},
}


@pytest.mark.parametrize("kind", FORMS)
def test_what_does_not_fit_is_refused(kind: str) -> None:
    form = FORMS[kind]()
    spec, tensors = form.spec(), form.tensors()
    cases = broken(form)
    cases += [({k: v for k, v in spec.items() if k != name}, tensors) for name in spec]
    cases += [({**spec, "layout": value}, tensors) for value in (0, 2, "1", True)]
    for name, values in WRONG[kind].items():
        cases += [({**spec, name: value}, tensors) for value in values]
    for suffix, tensor in tensors.items():
        if tensor.is_floating_point():
            cases += [(spec, {**tensors, suffix: torch.full_like(tensor, x)}) for x in (float("nan"), float("inf"))]
            if suffix != "_mean" and suffix != "_second_mean":
                cases.append((spec, {**tensors, suffix: torch.full_like(tensor, -1)}))
    for bad_spec, bad_tensors in cases:
        with pytest.raises(InputError):
            restore_form(bad_spec, bad_tensors)


def test_masks_and_exponents_that_do_not_fit_are_refused() -> None:
    form = split()
    tensors = form.tensors()
    for mask in (torch.zeros_like(tensors["_mask"]), torch.full_like(tensors["_mask"], 255)):
        with pytest.raises(InputError, match="_mask"):
            restore_form(form.spec(), {**tensors, "_mask": mask})
    powers = power()
    for exponent in (0, 65):
        with pytest.raises(InputError, match="_exponent"):
            restore_form(
                powers.spec(), {**powers.tensors(), "_exponent": torch.full((7,), exponent, dtype=torch.uint8)}
            )


def test_scales_are_the_nearest_that_can_be_stored() -> None:
    wanted = torch.rand(5, 9, generator=seeded(0))
    wanted[2] = 0
    assert torch.equal(Scales.of(wanted, 16).values(), wanted.half().float())
    eight = Scales.of(wanted, 8)
    assert bool(((eight.values() - wanted).abs() <= eight.factor.float()[:, None] * 0.51).all())  # type: ignore[union-attr]
    assert not bool(eight.values()[2].any())
    with pytest.raises(InputError, match="fp16"):
        Scales.of(torch.full((1, 1), 1e6), 16)
