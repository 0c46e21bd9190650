"""The sparse form: its grid, exact bytes and decoding, rows cut anywhere, and the refusal of what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.encoding.test_positions import mask_of
from torch import Tensor

from layerwise.encoding.encoded import layout_bytes
from layerwise.encoding.forms import restore_form
from layerwise.encoding.signed import SignedGrid, _placed, fit_signed, round_signed
from layerwise.encoding.sparse import Sparse, sparse_layout
from layerwise.errors import InputError


def matrix(rows: int = 7, columns: int = 45, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def made(
    kind: SignedGrid | torch.dtype, pattern: str = "mask", rows: int = 7, columns: int = 45, seed: int = 0
) -> Sparse:
    weight, mask = matrix(rows, columns, seed), mask_of(rows, columns, pattern, seed)
    if not isinstance(kind, SignedGrid):
        return Sparse.from_values(weight, mask, pattern, kind)
    fitted = fit_signed(weight, mask, kind)
    return Sparse.from_codes(round_signed(weight, fitted), mask, pattern, fitted)


grids = st.builds(SignedGrid, st.integers(1, 8), st.sampled_from([0, 1, 5, 16, 64]), st.sampled_from([8, 16]))
kinds = grids | st.sampled_from([torch.float16, torch.bfloat16])
patterns = st.sampled_from(["mask", "2:4"])


@given(kinds, patterns, st.integers(1, 9), st.integers(1, 70), st.integers(0, 99))
def test_what_is_stored_is_what_the_layout_says_and_restores(
    kind: SignedGrid | torch.dtype, pattern: str, rows: int, columns: int, seed: int
) -> None:
    form = made(kind, pattern, rows, columns, seed)
    tensors, layout = form.tensors(), sparse_layout(rows, columns, pattern, form.kept, kind)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == layout
    assert form.nbytes == layout_bytes(layout)
    again = restore_form(form.spec(), tensors)
    assert torch.equal(again.decode(), form.decode()) and again.spec() == form.spec()
    mask = mask_of(rows, columns, pattern, seed)
    assert bool((form.decode()[~mask] == 0).all())
    if not isinstance(kind, SignedGrid):
        assert torch.equal(form.decode()[mask], matrix(rows, columns, seed)[mask].to(kind).float())


def test_bits_per_weight_of_the_card() -> None:
    """Half of the values in 16 bits cost 9 bits a weight with a mask, a third of a bit less as 2:4."""
    half = 64 * 1536 // 2

    def bits(kind: SignedGrid | torch.dtype, pattern: str) -> float:
        return layout_bytes(sparse_layout(64, 1536, pattern, half, kind)) * 8 / (64 * 1536)

    assert bits(torch.float16, "mask") == 9.0
    assert bits(torch.float16, "2:4") == 8 + 2 / 3
    assert bits(SignedGrid(4, 128), "mask") == 1 + 2 + (16 + 8) / 128
    assert bits(SignedGrid(1, 128), "mask") == 1 + 0.5 + 16 / 128


@pytest.mark.parametrize("pattern", ["mask", "2:4"])
@pytest.mark.parametrize("kind", [torch.float16, SignedGrid(3, 16), SignedGrid(7, 16, 8), SignedGrid(1, 0)], ids=str)
def test_rows_and_gathered_rows_are_those_of_the_whole(
    kind: Any, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's codes begin in the middle of a byte: wherever a range is cut, the same values come out."""
    monkeypatch.setattr("layerwise.encoding.encoded.CHUNK_ELEMENTS", 100)
    monkeypatch.setattr("layerwise.encoding.grid.CHUNK", 100)
    form = made(kind, pattern)
    whole = form.decode()
    for start in range(7):
        for stop in range(start, 8):
            assert torch.equal(form.decode_rows(start, stop), whole[start:stop])
    index = torch.tensor([6, 0, 6, 3])
    assert torch.equal(form.take_rows(index), whole[index])
    assert form.take_rows(torch.empty(0, dtype=torch.int64)).shape == (0, 45)
    x = torch.randn(2, 3, 45, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(form.multiply(x), x @ whole.T)
    with pytest.raises(IndexError):
        form.take_rows(torch.tensor([7]))


# ---------------------------------------------------------------- the grid


def test_decode_is_the_formula_in_float32() -> None:
    grid = SignedGrid(3, 16)
    weight, mask = matrix(), mask_of(7, 45, "mask")
    fitted = fit_signed(weight, mask, grid)
    codes, decoded = round_signed(weight, fitted), made(grid).decode()
    for row, column in mask.nonzero().tolist():
        code, group = int(codes[row, column]), column // 16
        size = (fitted.floors()[row, group] + code % 4) * fitted.steps()[row, group]
        assert decoded[row, column] == (-size if code >= 4 else size)
        assert code >= 4 or weight[row, column] >= 0


@given(grids, st.integers(1, 6), st.integers(1, 50), st.integers(0, 99))
def test_the_compiled_loop_is_the_reference(grid: SignedGrid, rows: int, columns: int, seed: int) -> None:
    form = made(grid, "mask", rows, columns, seed)
    assert form.fitted is not None
    steps, floors = form.fitted.steps(), form.fitted.floors()
    codes = form._run(0, form.kept)
    assert torch.equal(form._gathered(torch.arange(form.kept)), codes)
    reference = _placed(codes, form.mask(), steps, floors, grid.width(columns), grid.levels)
    assert torch.equal(form.decode(), reference)


def test_nearest_means_nearest() -> None:
    weight, mask = matrix(5, 64), torch.ones(5, 64, dtype=torch.bool)
    fitted = fit_signed(weight, mask, SignedGrid(3, 0))
    sizes = (fitted.floors() + torch.arange(4.0)) * fitted.steps()  # [5, 4]
    points = torch.cat([sizes, -sizes], 1)
    codes = round_signed(weight, fitted).long()
    chosen = points.gather(1, codes)
    best = (weight[:, :, None] - points[:, None]).abs().amin(2)
    torch.testing.assert_close((weight - chosen).abs(), best)


def test_one_bit_is_a_sign_and_the_mean_magnitude() -> None:
    weight, mask = matrix(), mask_of(7, 45, "mask")
    fitted = fit_signed(weight, mask, SignedGrid(1, 0))
    assert fitted.floor is None
    mean = torch.stack([row[kept].abs().mean() for row, kept in zip(weight, mask, strict=True)])
    torch.testing.assert_close(fitted.steps()[:, 0], mean, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_hole_around_zero_is_what_lowers_the_error(bits: int) -> None:
    """Ablation: on what pruning leaves, the same number of bits without the hole leaves far more error."""
    weight = matrix(16, 256)
    mask = weight.abs() > weight.abs().median()
    fitted = fit_signed(weight, mask, SignedGrid(bits, 64))
    ours = Sparse.from_codes(round_signed(weight, fitted), mask, "mask", fitted).decode()

    least = torch.inf  # the best even grid, +-(1/2 + m) s, one step for all groups of this homogeneous matrix
    for step in torch.linspace(0.002, 0.1, 200):
        m = (weight.abs() / step - 0.5).round().clamp(0, 2 ** (bits - 1) - 1)
        even = torch.where(mask, weight.sign() * (m + 0.5) * step, 0)
        least = min(least, float((even - weight)[mask].square().sum()))
    assert float((ours - weight)[mask].square().sum()) < 0.75 * least


def test_importance_moves_the_grid_to_what_matters() -> None:
    weight, mask = matrix(8, 64), mask_of(8, 64, "mask")
    importance = torch.ones(64)
    importance[:8] = 100

    def error(importance: Tensor | None) -> float:
        fitted = fit_signed(weight, mask, SignedGrid(2, 0), importance)
        decoded = Sparse.from_codes(round_signed(weight, fitted), mask, "mask", fitted).decode()
        return float((decoded - weight)[:, :8][mask[:, :8]].square().sum())

    assert error(importance) < 0.7 * error(None)


@pytest.mark.parametrize("scale_bits", [8, 16])
def test_equal_magnitudes_and_empty_groups(scale_bits: int) -> None:
    weight = torch.full((2, 32), -0.7)
    mask = torch.zeros(2, 32, dtype=torch.bool)
    mask[:, :5] = True
    form = Sparse.from_codes(
        round_signed(weight, fitted := fit_signed(weight, mask, SignedGrid(3, 8, scale_bits))), mask, "mask", fitted
    )
    torch.testing.assert_close(form.decode()[:, :5], weight[:, :5], rtol=0.03, atol=0)


def test_a_weight_too_large_for_its_step_is_refused() -> None:
    with pytest.raises(InputError, match="65504"):
        fit_signed(torch.full((1, 4), 1e7), torch.ones(1, 4, dtype=torch.bool), SignedGrid(1, 0))
    with pytest.raises(InputError, match="float16 cannot hold"):
        Sparse.from_values(torch.full((1, 4), 1e7), torch.ones(1, 4, dtype=torch.bool), "mask", torch.float16)


# ---------------------------------------------------------------- hostile input


@pytest.mark.parametrize("pattern", ["mask", "2:4"])
@pytest.mark.parametrize("kind", [torch.float16, SignedGrid(3, 16, 8)], ids=str)
def test_a_form_that_does_not_fit_is_refused(kind: Any, pattern: str) -> None:
    form = made(kind, pattern)
    spec, tensors = form.spec(), form.tensors()
    cases: list[tuple[dict[str, Any], dict[str, Tensor]]] = [
        ({k: v for k, v in spec.items() if k != name}, tensors) for name in spec
    ]
    wrong: dict[str, tuple[Any, ...]] = {
        "shape": (None, [7], [7, -45], [7.0, 45], [8, 45], [45, 7], [2**62, 2**62]),
        "layout": (0, 2, "1", True),
        "pattern": ("4:8", None, ["mask"], {"mask": "2:4", "2:4": "mask"}[pattern]),
        "kept": (form.kept - 1, form.kept + 8, -1, 10**9, float(form.kept), True, None),
    }
    if isinstance(kind, SignedGrid):
        wrong |= {"bits": (0, 9, 4, "3", True), "group": (-1, 8, "16"), "scale_bits": (16, 4, True)}
        wrong |= {"dtype": ("float16",)}
    else:
        wrong |= {"dtype": ("bfloat16", "float32", "int8", None, [])}
    cases += [({**spec, name: value}, tensors) for name, values in wrong.items() for value in values]
    cases += [(spec, {**tensors, "_extra": torch.ones(1)}), (spec, {})]
    for suffix, tensor in tensors.items():
        cases.append((spec, {k: t for k, t in tensors.items() if k != suffix}))
        for bad in (tensor.to(torch.float64), tensor[None], tensor[:-1]):
            cases.append((spec, {**tensors, suffix: bad}))
    if "_scale" in tensors:
        cases.append((spec, {**tensors, "_scale": torch.zeros_like(tensors["_scale"])}))
        for value in (float("nan"), float("inf"), 0.0, -1.0):
            cases.append((spec, {**tensors, "_scale_factor": torch.full((7,), value).half()}))
    else:
        cases.append((spec, {**tensors, "_values": torch.full_like(tensors["_values"], float("nan"))}))
    for bad_spec, bad_tensors in cases:
        with pytest.raises(InputError):
            restore_form(bad_spec, bad_tensors)


@pytest.mark.parametrize("pattern", ["mask", "2:4"])
def test_positions_must_match_the_values_and_be_written_the_one_way(pattern: str) -> None:
    form = made(SignedGrid(3, 16), pattern)
    for byte, change in ((0, 255), (-1, 255), (-1, 216)):  # of 45 columns, the last byte uses five bits or one digit
        positions = form.tensors()[""].clone()
        positions[byte] = change
        with pytest.raises(InputError, match="positions"):
            restore_form(form.spec(), {**form.tensors(), "": positions})


def test_a_row_of_two_in_four_may_not_take_from_another() -> None:
    """Three columns keep two; a row that keeps one, evened out by no other row, is still counted."""
    form = made(torch.float16, "2:4", 2, 7)
    positions = form.tensors()[""].view(2, 1).clone()
    positions[0] = positions[0] % 6 + 6 * 2  # columns 0 and 3 of the last run, which has three
    with pytest.raises(InputError, match="positions"):
        restore_form(form.spec(), {**form.tensors(), "": positions.reshape(-1)})
