"""Codebooks: the published tables, exact scales, nearest levels, and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from tests.encoding.test_integer import broken
from torch import Tensor

from layerwise.encoding.codebook import LEVELS, Codebook, codebook_layout, fit_codebook, nearest_levels
from layerwise.encoding.encoded import layout_bytes
from layerwise.encoding.forms import restore_form
from layerwise.errors import InputError


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def form(name: str, weight: Tensor, group: int = 16, scale_bits: int = 16, search: bool = False) -> Codebook:
    fitted = fit_codebook(weight, name, group, scale_bits, search=search)
    return Codebook.from_codes(nearest_levels(weight, name, fitted), name, fitted)


@given(
    st.sampled_from(sorted(LEVELS)), st.sampled_from([0, 1, 5, 16, 64]), st.sampled_from([8, 16]), st.booleans(),
    st.integers(1, 9), st.integers(1, 70),
)  # fmt: skip
def test_what_is_stored_is_what_the_layout_says_and_restores(
    name: str, group: int, scale_bits: int, search: bool, rows: int, columns: int
) -> None:
    made = form(name, normal(rows, columns), group, scale_bits, search)
    tensors, layout = made.tensors(), codebook_layout(group, scale_bits, rows, columns)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == layout
    assert made.nbytes == layout_bytes(layout)
    again = restore_form(made.spec(), tensors)
    assert torch.equal(again.decode(), made.decode()) and again.spec() == made.spec()


def test_bits_per_weight_of_the_card() -> None:
    assert layout_bytes(codebook_layout(64, 16, 64, 1024)) * 8 / (64 * 1024) == 4.25
    assert layout_bytes(codebook_layout(64, 8, 64, 1024)) * 8 / (64 * 1024) == 4.125 + 16 / 1024


def test_nf4_is_the_quantiles_of_the_normal_distribution() -> None:
    top = torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1]
    low = torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1]
    levels = sorted([*norm.ppf(top), 0.0, *(-norm.ppf(low))])
    assert LEVELS["nf4"] == pytest.approx([x / max(levels) for x in levels], abs=5e-5)
    assert len(set(LEVELS["nf4"])) == 16 and sorted(LEVELS["nf4"]) == list(LEVELS["nf4"])


def test_e2m1_is_the_float_of_its_bits() -> None:
    for code, level in enumerate(LEVELS["e2m1"]):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        value = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
        assert level == (-value if sign else value)


@pytest.mark.parametrize("name", LEVELS)
def test_no_other_level_is_nearer_and_codes_of_points_are_their_codes(name: str) -> None:
    weight = normal(6, 45)
    made = form(name, weight)
    steps = made.fitted.steps()[:, torch.arange(45) // 16]
    distances = (weight[..., None] - torch.tensor(LEVELS[name]) * steps[..., None]).abs().amin(2)
    torch.testing.assert_close((made.decode() - weight).abs(), distances)
    assert torch.equal(nearest_levels(made.decode(), name, made.fitted), made.codes())


@pytest.mark.parametrize("scale_bits", [8, 16])
def test_the_largest_weight_of_a_group_is_met(scale_bits: int) -> None:
    weight = normal(6, 48).abs()
    made = form("nf4", weight, 16, scale_bits)
    largest, found = (t.view(6, 3, 16).amax(2) for t in (weight, made.decode()))
    assert bool((found >= largest).all()) and bool((made.codes().view(6, 3, 16).amax(2) == 15).all())
    torch.testing.assert_close(found, largest, rtol=1e-3 if scale_bits == 16 else 1 / 40, atol=0)


def test_the_search_never_leaves_more_weighted_error() -> None:
    weight, importance = normal(8, 45), torch.rand(45, generator=torch.Generator().manual_seed(1)) ** 4
    errors = []
    for search in (False, True):
        fitted = fit_codebook(weight, "nf4", 16, search=search, importance=importance)
        decoded = Codebook.from_codes(nearest_levels(weight, "nf4", fitted), "nf4", fitted).decode()
        errors.append(float(((decoded - weight) ** 2 @ importance).sum()))
    assert errors[1] < 0.9 * errors[0]


def test_what_does_not_fit_is_refused() -> None:
    made = form("nf4", normal(7, 45), scale_bits=8)
    spec, tensors = made.spec(), made.tensors()
    cases = broken(made)
    cases += [({k: v for k, v in spec.items() if k != name}, tensors) for name in spec]
    for name, values in {
        "codebook": (None, 4, "nf5", []),
        "group": (-1, 8, 2.5, "16", None),
        "scale_bits": (16, 4, True, None),
        "layout": (0, 2, "1", True),
    }.items():
        cases += [({**spec, name: value}, tensors) for value in values]
    cases.append((spec, {**tensors, "_scale": torch.zeros_like(tensors["_scale"])}))
    for value in (float("nan"), float("inf"), 0.0, -1.0):
        cases.append((spec, {**tensors, "_scale_factor": torch.full((7,), value).half()}))
    for bad_spec, bad_tensors in cases:
        with pytest.raises(InputError):
            restore_form(bad_spec, bad_tensors)
    for bad in (torch.tensor([[float("nan")]]), torch.tensor([[1e9]]), torch.ones(3)):
        with pytest.raises(InputError):
            fit_codebook(bad, "nf4", 16)
    with pytest.raises(InputError, match="importance"):
        fit_codebook(normal(2, 3), "nf4", 16, importance=torch.ones(4))
