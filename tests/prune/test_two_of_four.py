"""2:4 masks with int8 and int4 values: bytes, pattern, and the order of magnitude, Wanda and SparseGPT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.quantize.conftest import loss
from torch import Tensor

from layerwise.encoding.encoded import layout_bytes
from layerwise.encoding.forms import restore_form
from layerwise.recipe import parse_technique

NAMES = ("magnitude", "wanda", "sparsegpt")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [8, 4])
def test_two_of_each_four_are_kept_as_codes_and_every_byte_counts(
    name: str, bits: int, weight: Tensor, moments: Any, site: Any
) -> None:
    encoder: Any = parse_technique(f"{name}:pattern=2:4,bits={bits},group=24,scale_bits=8")
    found = encoder.encode(weight, site(torch.ones(40), moments(72)[0]))
    decoded = found.decode()
    assert bool(((decoded.view(-1, 4) != 0).sum(1) <= 2).all())
    values, positions = 40 * 36 * bits // 8, 40 * 6  # a byte of positions for each twelve columns
    assert found.nbytes == layout_bytes(encoder.layout(40, 72)) >= values + positions
    assert found.nbytes - values - positions <= 40 * (3 * 2 + 3 + 4), "scales and floors, and a factor a row"
    assert torch.equal(restore_form(found.spec(), found.tensors()).decode(), decoded)


def test_each_method_has_less_error_than_the_one_before_it(weight: Tensor, moments: Any, site: Any) -> None:
    fit, _ = moments(72)
    errors = {
        (name, bits): loss(
            parse_technique(f"{name}:pattern=2:4,bits={bits},group=24")  # type: ignore[attr-defined]
            .encode(weight, site(torch.ones(40), fit))
            .decode()
            - weight,
            fit,
        )
        for name in NAMES
        for bits in (16, 8, 4)
    }
    for bits in (8, 4):
        assert errors["sparsegpt", bits] < errors["wanda", bits] < errors["magnitude", bits]
        for name in NAMES:
            assert errors[name, bits] < (1.01 if bits == 8 else 1.2) * errors[name, 16], "pruning costs, values hardly"
