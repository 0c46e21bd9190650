"""WELORE: what its threshold is put to, the ranks that follow, and what they are worth on real spectra."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.plan.figures import MadeUp

from layerwise.plan.measures import Place
from layerwise.plan.tree import Candidate, Leaf, Sum, leaves
from layerwise.plan.welore import Welore
from layerwise.recipe import parse_allocator
from layerwise.sensitivity.spectrum import Spectrum, dropped, spectrum_of

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "docs-lm"
RATIOS = tuple(i / 20 for i in range(1, 20))


@dataclass(frozen=True)
class Real(MadeUp):
    """Sites with given spectra."""

    found: Any = None

    @property
    def places(self) -> Mapping[str, Place]:  # type: ignore[override]
        return {site: Place(s.rows * s.columns, "block") for site, s in self.found.items()}

    def spectra(self) -> Mapping[str, Spectrum]:
        return dict(self.found)


def tree_of(spectra: Mapping[str, Spectrum]) -> Sum:
    """Dense, or factors of some ratios, in 16 bits; the damage is the relative energy that is cut off."""
    made = []
    for site, s in spectra.items():
        energy = torch.tensor(s.values).square()
        found = [Candidate("dense", 2 * s.rows * s.columns, 0.0)]
        for ratio in RATIOS:
            rank = max(1, int(ratio * s.rows * s.columns / (s.rows + s.columns)))
            left = float(energy[: len(energy) - rank].sum() / energy.sum())
            found.append(Candidate(f"svd:ratio={ratio}", 2 * rank * (s.rows + s.columns), left))
        made.append(Leaf(site, tuple(found)))
    return Sum("network", tuple(made))


def geometric(pace: float, rows: int = 64, columns: int = 64) -> Spectrum:
    return Spectrum(tuple(sorted(pace**i for i in range(min(rows, columns)))), rows, columns)


def test_the_measure_is_that_of_the_paper_and_ignores_scale_and_rotation() -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)).double()
    left, right = (torch.linalg.qr(torch.randn(n, n).double()).Q for n in (24, 40))
    s = torch.linalg.svdvals(weight)
    plain = spectrum_of(weight).normalised()
    assert plain == pytest.approx(((s - s[-1]) / (s[0] - s[-1])).flip(0).tolist(), abs=1e-9)
    for other in (7 * weight, left @ weight @ right, weight.T):
        assert spectrum_of(other).normalised() == pytest.approx(plain, abs=1e-7)
    assert dropped(plain, 0.0) == 0 and dropped(plain, 1.5) == 24
    assert all(dropped(plain, a) <= dropped(plain, b) for a, b in pairwise([0, 0.1, 0.3, 0.5, 0.9, 1.1]))


def test_an_outlying_singular_value_is_looked_past() -> None:
    values = (*(0.5 + i / 100 for i in range(50)), 1000.0)
    outlying = Spectrum(values, 51, 51)
    assert dropped(outlying.normalised(), 0.3) == 50 and dropped(outlying.normalised(0.9), 0.3) < 20


def test_heavy_tails_get_low_ranks_and_flat_spectra_stay_whole() -> None:
    spectra = {"steep": geometric(0.8), "slow": geometric(0.95), "flat": Spectrum((1.0,) * 64, 64, 64)}
    tree = tree_of(spectra)
    total = sum(2 * s.rows * s.columns for s in spectra.values())
    found = Welore().allocate(tree, int(0.6 * total), Real(tree, found=spectra))
    sizes = {site: candidate.bytes for site, candidate in found.sites.items()}
    assert sizes["steep"] < sizes["slow"] < sizes["flat"] == 2 * 64 * 64


def test_little_loss_of_rank_keeps_a_matrix_whole() -> None:
    """At min_drop = 0.5 a matrix is whole or has lost more than half of its rank."""
    spectra = {f"s{i}": geometric(0.8 + i / 50, 64, 96) for i in range(8)}
    tree = tree_of(spectra)
    total = sum(2 * s.rows * s.columns for s in spectra.values())
    for share in (0.4, 0.6, 0.8):
        found = parse_allocator("welore:min_drop=0.5").allocate(tree, int(share * total), Real(tree, found=spectra))
        for candidate in found.sites.values():
            assert candidate.recipe == "dense" or candidate.bytes <= 2 * 32 * (64 + 96) * 1.1


@pytest.mark.skipif(not EXAMPLE.is_dir(), reason="the example network is part of a source checkout")
def test_on_a_trained_network_the_shape_of_the_spectra_is_worth_something() -> None:
    """Ablation: one ratio everywhere, and a threshold on the singular values themselves, in as many bytes."""
    from layerwise.network.network import open_network

    network = open_network(EXAMPLE)
    spectra = {s.name: spectrum_of(network.read_site(s)) for s in network.tree.sites if s.kind == "linear"}
    tree = tree_of(spectra)
    measures = Real(tree, found=spectra)
    for ratio in (0.5, 0.7, 0.9):
        uniform = [next(c for c in leaf.candidates if c.recipe == f"svd:ratio={ratio}") for leaf in leaves(tree)]
        budget = sum(c.bytes for c in uniform)
        found = {
            options: parse_allocator(f"welore:{options}").allocate(tree, budget, measures)
            for options in ("top=1.0", "top=0.9", "normalised=false")
        }
        assert all(0.98 * budget < allocation.bytes <= budget for allocation in found.values())
        paper, robust, raw = (allocation.damage for allocation in found.values())
        assert paper < 0.8 * raw, "the shape of a spectrum, and not its scale"
        plain = sum(c.damage for c in uniform)
        # Only where little is cut does any allotment beat one ratio for all on this network.
        assert min(paper, robust) < 0.85 * plain if ratio == 0.9 else robust < min(paper, 1.02 * plain)
