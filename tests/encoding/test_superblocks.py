"""ggml's blocks of 256 columns as a form: the values of the ``gguf`` package, of our own writer, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.encoding.test_integer import broken

from layerwise.encoding.forms import restore_form
from layerwise.encoding.ggml_blocks import SHIFTED, SIGNED, TYPES, pack
from layerwise.encoding.ggml_forms import form_of, values_of
from layerwise.encoding.superblocks import HALVES, Superblock, superblock_layout
from layerwise.errors import InputError
from layerwise.export.gguf import exact_type


def blocks(kind: str, rows: int = 5, count: int = 3, seed: int = 0) -> np.ndarray:
    """Random bytes with sound fp16 numbers, negative ones among them."""
    draw = np.random.default_rng(seed)
    made = draw.integers(0, 256, (rows * count, TYPES[kind].nbytes)).astype(np.uint8)
    for at in HALVES[kind]:
        made[:, at : at + 2] = draw.normal(size=(rows * count, 1)).astype(np.float16).view(np.uint8)
    return made.reshape(rows, -1)


def form(kind: str) -> Superblock:
    made = form_of(kind, blocks(kind), 768)
    assert isinstance(made, Superblock)
    return made


@pytest.mark.parametrize("kind", HALVES)
def test_the_values_are_those_of_the_gguf_package(kind: str):
    gguf = pytest.importorskip("gguf")
    wanted = gguf.quants.dequantize(blocks(kind), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(form(kind).decode().numpy(), wanted)
    assert np.array_equal(values_of(kind, blocks(kind), 768).numpy(), wanted)


@pytest.mark.parametrize("kind", HALVES)
def test_what_our_writer_packs_is_read(kind: str):
    draw = np.random.default_rng(1)
    low, high = SIGNED[kind][:2] if kind in SIGNED else (SHIFTED[kind][1], 0)
    top = high if kind in SIGNED else low + SHIFTED[kind][0]
    levels = draw.integers(low, top + 1, (4, 512)).astype(np.int16)
    steps = np.abs(draw.normal(size=(4, 2))).astype(np.float16).repeat(8, axis=1)
    read = form_of(kind, pack(kind, levels, steps), 512).decode().numpy()
    assert np.array_equal(read, levels * steps.astype(np.float32).repeat(32, axis=1))


def test_a_block_of_q4_k_by_hand():
    """One block, byte by byte: d = 0.5, e = 0.25; the scale of the sixth group has bits in two places."""
    packed = np.zeros(144, np.uint8)
    packed[:4] = np.array([0.5, 0.25], np.float16).view(np.uint8)
    packed[4 + 1] = 0b10 << 6 | 7  # the second group's scale is 7; the upper bits of the sixth's
    packed[8 + 1] = 0b01 << 6 | 3  # the second group's least level is 3; the upper bits of the sixth's
    packed[12 + 1] = 0b0101 << 4 | 0b1001  # the lower bits of the sixth's: least level 5, scale 9
    packed[16 + 4] = 11 << 4 | 2  # column 4 of the first group, and of the second
    packed[16 + 64 + 30] = 13 << 4  # column 30 of the sixth
    values = form_of("Q4_K", packed[None], 256).decode()[0]
    assert values[32 + 4] == 0.5 * 7 * 11 - 0.25 * 3 and values[32 + 5] == -0.25 * 3 and values[4] == 0
    scale, least = 0b101001, 0b010101
    assert values[160 + 30] == 0.5 * scale * 13 - 0.25 * least and values[160] == -0.25 * least


@pytest.mark.parametrize("kind", HALVES)
def test_what_is_stored_restores_bit_for_bit(kind: str):
    made = form(kind)
    tensors = made.tensors()
    assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == superblock_layout(kind, 5, 768)
    assert made.nbytes == 5 * 3 * TYPES[kind].nbytes
    again = restore_form(made.spec(), tensors)
    assert torch.equal(again.decode(), made.decode()) and again.spec() == made.spec()
    index, whole = torch.tensor([4, 0, 4]), made.decode()
    assert torch.equal(made.take_rows(index), whole[index]) and torch.equal(made.decode_rows(1, 3), whole[1:3])
    x = torch.randn(2, 3, 768, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(made.multiply(x), x @ whole.T, atol=1e-3, rtol=1e-4)
    assert exact_type(made) == kind  # an export writes the blocks as they came in


@pytest.mark.parametrize(
    "change",
    [{"type": "Q4_0"}, {"type": 4}, {"shape": [5, 760]}, {"shape": [6, 768]}, {"layout": 2}, {"shape": [5, 2**50]}],
    ids=str,
)
def test_a_spec_that_does_not_fit_is_refused(change: dict[str, object]):
    made = form("Q4_K")
    with pytest.raises(InputError) as refused:
        restore_form(made.spec() | change, made.tensors())
    assert "\n" not in str(refused.value)


def test_damaged_tensors_are_refused():
    made = form("Q6_K")
    tensors = made.tensors()
    for spec, worse in broken(made):
        with pytest.raises(InputError):
            restore_form(spec, worse)
    endless = tensors[""].clone()
    endless[208:210] = torch.tensor([torch.inf]).half().view(torch.uint8)
    with pytest.raises(InputError, match="no finite number"):
        restore_form(made.spec(), {"": endless})
