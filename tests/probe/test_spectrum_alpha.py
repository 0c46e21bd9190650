"""Exponents of real and made-up matrices: what must not change them, and what the control says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import layerwise
from layerwise.probe._power_law import fit_tail
from layerwise.probe.spectrum_alpha import SpectrumAlpha, eigenvalues, random_edge, shuffled_spectrum


def normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def heavy(rows: int, columns: int, seed: int) -> Tensor:
    """Student's t with 1.5 degrees of freedom."""
    return torch.from_numpy(np.random.default_rng(seed).standard_t(1.5, (rows, columns))).float()


def exponent(weight: Tensor) -> float:
    fit = fit_tail(eigenvalues(weight))
    assert fit is not None
    return fit.alpha


def test_eigenvalues_are_squared_singular_values() -> None:
    weight = normal(70, 40, 0)
    assert np.allclose(eigenvalues(weight)[::-1], torch.linalg.svdvals(weight.double()).square(), rtol=1e-10)


def test_zero_eigenvalues_are_left_out() -> None:
    assert len(eigenvalues(torch.ones(60, 50))) == 1
    assert len(eigenvalues(torch.eye(60, 50))) == 50
    assert len(eigenvalues(torch.zeros(60, 50))) == 0


def test_scale_transposition_and_rotation_change_nothing() -> None:
    weight = heavy(120, 80, 3)
    turn = torch.linalg.qr(normal(120, 120, 4).double())[0]
    alpha = exponent(weight)
    assert exponent(weight * 8) == pytest.approx(alpha, rel=1e-9)
    assert exponent(weight.T) == pytest.approx(alpha, rel=1e-9)
    assert exponent(turn @ weight.double()) == pytest.approx(alpha, rel=1e-6)


def test_heavy_tailed_entries_show_their_exponent() -> None:
    """Eigenvalues of entries with tail index 1.5 have density exponent 1 + 1.5 / 2."""
    alphas = [exponent(heavy(600, 300, seed)) for seed in range(3)]
    assert 1.65 < np.mean(alphas) < 2.1


def test_shuffling_keeps_the_entries_and_finds_traps() -> None:
    weight = normal(100, 60, 5)
    copy = weight.clone()
    mixed, traps = shuffled_spectrum(weight, 0)
    assert torch.equal(weight, copy)
    assert mixed.sum() == pytest.approx(float(weight.double().square().sum()), rel=1e-6)
    assert traps == 0
    weight[3, 7] = 60.0
    assert shuffled_spectrum(weight, 0)[1] == 1


def test_a_shared_mean_is_no_trap() -> None:
    assert shuffled_spectrum(normal(100, 60, 6) + 5.0, 0)[1] == 0


def test_the_random_edge_holds_as_often_as_it_says() -> None:
    above = sum(eigenvalues(normal(60, 30, seed))[-1] > random_edge(60, 30, 1.0) for seed in range(200))
    assert above <= 8  # 2 expected


def test_a_trained_network_has_structure_that_its_shuffled_entries_have_not(docs_lm: Path) -> None:
    found = layerwise.probe(layerwise.open(docs_lm), "spectrum_alpha")
    own, control = (sum(v is not None for v in found.column(n).values()) for n in ("alpha", "shuffled alpha"))
    assert own > len(found.rows) / 2 and control <= 2
    assert found.rows[-1].place == "lm_head"
    assert len(found.pictures) == 2


def test_small_matrices_are_named_and_left_out(tiny_bert: Path) -> None:
    found = SpectrumAlpha().measure(layerwise.open(tiny_bert), None)
    assert set(found.column("remark").values()) == {"only 48 values"}
    assert "None of the" in found.summary
    assert set(found.column("alpha").values()) == {None}


def test_hill_reads_a_fixed_share(tiny_llama: Path) -> None:
    found = layerwise.probe(layerwise.open(tiny_llama), "spectrum_alpha:estimator=hill,share=0.25")
    assert {v for v in found.column("tail").values() if v is not None} == {16}
