"""The trellis: the formula of its states, rings of 32 rows, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.encoding.scales import Scales
from layerwise.encoding.trellis import STRIP, Trellis, states_of, trellis_layout
from layerwise.encoding.trellis_tables import MOST_BITS, table
from layerwise.errors import InputError


def made(rows: int, columns: int, bits: int, group: int = 16, scale_bits: int = 8) -> tuple[Tensor, Trellis]:
    generator = torch.Generator().manual_seed(rows * 100 + bits)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8)
    groups = 1 if group == 0 else -(-columns // min(group, columns))
    scales = Scales.of(torch.rand(rows, groups, generator=generator), scale_bits)
    return codes, Trellis.from_codes(codes, bits, group, scales)


@pytest.mark.parametrize("bits", range(1, MOST_BITS + 1))
@pytest.mark.parametrize(("rows", "columns", "group"), [(1, 1, 0), (31, 20, 16), (32, 7, 0), (70, 40, 16)])
def test_a_value_is_that_of_the_codes_above_it_round_the_ring(bits: int, rows: int, columns: int, group: int) -> None:
    codes, form = made(rows, columns, bits, group)
    width = columns if group == 0 else group
    steps = form.scales.values()
    expected = torch.empty(rows, columns)
    for r in range(rows):
        for c in range(columns):
            state = 0
            for back in range(8):
                above = r // STRIP * STRIP + (r % STRIP - back) % STRIP
                state |= (int(codes[above, c]) if above < rows else 0) << back * bits
            expected[r, c] = float(table(bits)[state % 256]) * steps[r, c // width]
    assert torch.equal(form.decode(), expected)
    assert torch.equal(states_of(codes, bits) % 2**bits, codes)
    some = torch.tensor([rows - 1, 0, rows // 2])
    assert torch.equal(form.take_rows(some), expected[some])
    assert torch.equal(form.decode_rows(rows // 2, rows), expected[rows // 2 :])


@pytest.mark.parametrize("scale_bits", [8, 16])
def test_it_is_restored_bit_for_bit_and_takes_the_bytes_it_says(scale_bits: int) -> None:
    _, form = made(45, 33, 3, 16, scale_bits)
    again = Trellis.restore(form.spec(), form.tensors())
    assert torch.equal(again.decode(), form.decode())
    layout = trellis_layout(3, 16, scale_bits, 45, 33)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in form.tensors().items()} == layout
    assert form.nbytes == 45 * (9 + 5) + 45 * 3 * scale_bits // 8 + (90 if scale_bits == 8 else 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bits": 6}, "1 to 5 bits"),
        ({"bits": True}, "1 to 5 bits"),
        ({"table": 2}, "table of a trellis"),
        ({"layout": 9}, "layout"),
        ({"group": -1}, "group"),
        ({"shape": [45, 0]}, "shape"),
        ({"shape": [46, 33]}, "must be uint8"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(change: dict[str, Any], said: str) -> None:
    _, form = made(45, 33, 3)
    with pytest.raises(InputError, match=said):
        Trellis.restore({**form.spec(), **change}, form.tensors())


def test_scales_that_are_no_numbers_are_refused() -> None:
    _, form = made(8, 8, 2, 0, 16)
    broken = {**form.tensors(), "_scale": torch.full((8, 1), float("nan")).half()}
    with pytest.raises(InputError, match="finite"):
        Trellis.restore(form.spec(), broken)
