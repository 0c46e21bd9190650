"""ggml's blocks: exactness of every type against the ``gguf`` package's own decoder, and against ours."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layerwise.encoding.ggml_blocks import INTEGER_TYPES, SHIFTED, SIGNED, TYPES, fits, pack, unpack
from layerwise.encoding.ggml_forms import BITS, form_of, values_of
from layerwise.encoding.grid import Grid, fit_grid, round_to_grid
from layerwise.encoding.integer import GroupedInteger
from layerwise.encoding.levels import levels_of
from layerwise.encoding.sums import Sum
from layerwise.errors import InputError

ROWS, COLUMNS = 5, 512


def drawn(name: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Levels and steps that a type holds, at both ends of its range and with both signs."""
    rng, width = np.random.default_rng(seed), TYPES[name].columns
    steps = np.abs(rng.normal(size=(ROWS, COLUMNS // width))).astype(np.float16)
    if name in SIGNED:
        low, high, part = SIGNED[name]
        levels = rng.integers(low, high + 1, (ROWS, COLUMNS // part, part))
        levels[:, :, :2] = low, high
        levels *= np.where(rng.random((ROWS, COLUMNS // part, 1)) < 0.5, -1, 1)
    else:
        span, lowest, part = SHIFTED[name]
        levels = rng.integers(0, span + 1, (ROWS, COLUMNS // part, part))
        levels[:, :, :2] = 0, span
        levels += rng.integers(-3 if lowest is None else lowest, 1, (ROWS, COLUMNS // part, 1))
        if lowest is None:
            steps = np.exp2(rng.integers(-6, 3, steps.shape)).astype(np.float16)  # so that s min L is exact
    return levels.reshape(ROWS, COLUMNS).astype(np.int16), np.repeat(steps, width // 32, 1)


def meant(levels: np.ndarray, steps: np.ndarray) -> np.ndarray:
    return levels.astype(np.float32) * np.repeat(steps.astype(np.float32), 32, 1)


@pytest.mark.parametrize("name", INTEGER_TYPES)
def test_the_reference_decoder_reads_every_type_bit_for_bit(name: str):
    gguf = pytest.importorskip("gguf")
    levels, steps = drawn(name)
    assert fits(name, levels, steps)
    packed = pack(name, levels, steps)
    kind = gguf.GGMLQuantizationType(TYPES[name].number)
    assert gguf.GGML_QUANT_SIZES[kind] == (TYPES[name].columns, TYPES[name].nbytes)
    assert np.array_equal(gguf.quants.dequantize(packed, kind).reshape(ROWS, COLUMNS), meant(levels, steps))


@pytest.mark.parametrize("name", INTEGER_TYPES)
def test_a_level_beyond_the_range_does_not_fit(name: str):
    levels, steps = drawn(name)
    row = levels[0]
    first = row[: SIGNED[name][2] if name in SIGNED else SHIFTED[name][2]]
    first[0] = first.max() + (SIGNED[name][1] - SIGNED[name][0] + 1 if name in SIGNED else SHIFTED[name][0] + 1)
    assert not fits(name, levels, steps)


@pytest.mark.parametrize("name", [n for n in INTEGER_TYPES if TYPES[n].columns == 256])
def test_a_block_of_256_columns_needs_one_step(name: str):
    levels, steps = drawn(name)
    steps = steps.copy()
    steps[0, 3] *= 2
    assert not fits(name, levels, steps)


@pytest.mark.parametrize("name", BITS)
def test_blocks_of_32_come_back(name: str):
    levels, steps = drawn(name, 1)
    packed = pack(name, levels, steps)
    found, scales, offsets = unpack(name, packed.reshape(-1, TYPES[name].nbytes))
    values = found * scales.astype(np.float32)[:, None]
    if offsets is not None:
        values = values + offsets.astype(np.float32)[:, None]
    assert np.array_equal(values.reshape(ROWS, COLUMNS), meant(levels, steps))


@pytest.mark.parametrize("name", BITS)
def test_a_form_of_ours_decodes_to_the_blocks_values(name: str):
    """Also blocks whose scale is zero or negative, as llama.cpp itself writes them."""
    rng = np.random.default_rng(3)
    packed = pack(name, *drawn(name, 2))
    blocks = packed.reshape(-1, TYPES[name].nbytes)
    scales = rng.normal(size=len(blocks)).astype(np.float16)
    scales[:4] = 0
    if name in SHIFTED:
        scales = np.abs(scales)
        blocks[:, 2:4] = rng.normal(size=len(blocks)).astype(np.float16)[:, None].view(np.uint8)
    blocks[:, :2] = scales[:, None].view(np.uint8)
    form = form_of(name, packed, COLUMNS)
    assert torch.equal(form.decode(), values_of(name, packed, COLUMNS))
    restored = type(form).restore(form.spec(), form.tensors())
    assert torch.equal(restored.decode(), form.decode())
    if not isinstance(form, Sum):
        bits = 8 * form.nbytes / (ROWS * COLUMNS)
        assert bits <= TYPES[name].bits + (0 if form.grid.symmetric else BITS[name] / 32)


@pytest.mark.parametrize("name", BITS)
def test_scales_that_are_no_numbers_are_refused(name: str):
    packed = pack(name, *drawn(name))
    packed[0, :2] = np.array([np.nan], np.float16).view(np.uint8)
    with pytest.raises(InputError, match="not finite"):
        form_of(name, packed, COLUMNS)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("group", [32, 128, 0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_levels_times_steps_are_the_values_of_a_grid(bits: int, group: int, symmetric: bool):
    weight = torch.randn(6, 160, generator=torch.Generator().manual_seed(bits))
    fitted = fit_grid(weight, Grid(bits, group, symmetric))
    form = GroupedInteger.from_codes(round_to_grid(weight, fitted), fitted)
    levels = levels_of(form)
    assert not isinstance(levels, str)
    whole, steps = levels.rows(1, 5)
    assert np.array_equal(meant(whole, steps), form.decode_rows(1, 5).numpy())


def test_what_has_no_levels_says_why():
    weight = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    fitted = fit_grid(weight, Grid(4, 50))
    assert "100 columns" in str(levels_of(GroupedInteger.from_codes(round_to_grid(weight, fitted), fitted)))
    weight = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    for grid, reason in ((Grid(4, 48), "groups of 48"), (Grid(4, 32, scale_bits=8), "8-bit scales")):
        fitted = fit_grid(weight, grid)
        assert reason in str(levels_of(GroupedInteger.from_codes(round_to_grid(weight, fitted), fitted)))
