"""DSFormer: pursuit and dictionaries, the errors that blocks hand on, and what a subspace for each row is worth."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from tests.factorize.conftest import loss
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics
from layerwise.encoding.dictionary import Dictionary
from layerwise.factorize._dictionary import in_root, learn, pursue, solve_atoms, spread, unit
from layerwise.recipe import parse_technique


def encode(options: str, weight: Tensor, known: SiteStatistics) -> Any:
    return parse_technique(f"dsformer:{options}").encode(weight, known)  # type: ignore[attr-defined]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def union_of_subspaces(rows: int, columns: int, atoms: int, kept: int) -> Tensor:
    """Rows that are each ``kept`` of ``atoms`` directions, and a little noise."""
    basis = unit(normal(atoms, columns))
    chosen = torch.stack([normal(atoms, seed=100 + i).argsort()[:kept] for i in range(rows)])
    found = spread(normal(rows, kept, seed=1), chosen, atoms) @ basis
    return (found + 0.02 * normal(rows, columns, seed=2)).float()


def test_pursuit_solves_for_all_coefficients_and_more_atoms_never_leave_more() -> None:
    atoms, seen = unit(normal(12, 8)), normal(20, 8, seed=1)
    before = seen.square().sum(1)
    for kept in range(1, 9):
        values, chosen = pursue(seen, atoms, kept)
        assert all(len(set(row)) == kept for row in chosen.tolist())
        left = seen - spread(values, chosen, 12) @ atoms
        slope = torch.einsum("rc,rjc->rj", left, atoms[chosen])
        assert float(slope.abs().max()) < 1e-5
        after = left.square().sum(1)
        assert bool((after <= before + 1e-9).all())
        before = after
    assert float(before.max()) < 1e-6  # eight independent atoms of eight columns


def test_among_orthogonal_atoms_pursuit_is_optimal() -> None:
    atoms, seen = torch.linalg.qr(normal(7, 7)).Q, normal(5, 7, seed=1)
    values, chosen = pursue(seen, atoms, 3)
    found = (seen - spread(values, chosen, 7) @ atoms).square().sum(1)
    against = seen @ atoms.T
    for row in range(5):
        kept = max(sum(float(against[row, i]) ** 2 for i in pick) for pick in combinations(range(7), 3))
        assert float(found[row]) == pytest.approx(float(seen[row].square().sum()) - kept, rel=1e-6)


def test_a_planted_dictionary_is_found_again() -> None:
    seen = union_of_subspaces(400, 16, 12, 2).double()
    atoms, values, chosen = learn(seen, 12, 2, 30)
    left = seen - spread(values, chosen, 12) @ atoms
    assert float(left.square().sum() / seen.square().sum()) < 0.1
    solved = solve_atoms(spread(values, chosen, 12), seen)
    again = seen - spread(values, chosen, 12) @ solved
    assert float(again.square().sum()) <= float(left.square().sum()) * (1 + 1e-9)


def test_more_rounds_never_leave_more() -> None:
    seen = normal(60, 16)
    losses = []
    for rounds in (1, 3, 9):
        atoms, values, chosen = learn(seen, 24, 4, rounds)
        losses.append(float((seen - spread(values, chosen, 24) @ atoms).square().sum()))
    assert all(after <= before for before, after in pairwise(losses)) and losses[-1] < 0.9 * losses[0]


def test_the_blocks_own_errors_add_up_to_the_objective(moments: Any) -> None:
    """tr(E C E^T) is the sum of what each block leaves of its target, whatever the errors are."""
    root = torch.linalg.cholesky(moments(24)[0].double() + 0.1 * torch.eye(24), upper=True)
    dense, stored = normal(9, 24), normal(9, 24, seed=3)
    error, total = stored - dense, 0.0
    for cut in (slice(0, 10), slice(10, 20), slice(20, 24)):
        left = stored[:, cut] @ root[cut, cut].T - in_root(dense, error, root, cut)
        total += float(left.square().sum())
    assert total == pytest.approx(loss(error, root.T @ root), rel=1e-9)


def test_every_coefficient_kept_is_a_low_rank_form() -> None:
    """Ablation: where a row keeps all atoms there is one subspace for all of them, and the loss is the SVD's."""
    weight = normal(40, 16).float()
    known = SiteStatistics.uninformed(40, 16)
    found = encode("atoms=6,block=16,kept=6,atom_bits=16,rounds=40", weight, known)
    best = float((torch.linalg.svdvals(weight.double())[6:] ** 2).sum())
    change = float((found.decode() - weight).double().square().sum())
    assert best * 0.999 <= change < 1.02 * best


def test_rows_with_subspaces_of_their_own_beat_low_rank_at_equal_bytes() -> None:
    """Ablation: every index and atom counted, against factors in as many bytes, planted and without any structure."""
    known = SiteStatistics.uninformed(256, 64)
    for weight, share in ((union_of_subspaces(256, 64, 32, 4), 0.5), (normal(256, 64).float(), 0.85)):
        mine = encode("atoms=32,block=64,kept=4,atom_bits=16", weight, known)
        other = parse_technique("svd:ratio=0.26").encode(weight, known)  # type: ignore[attr-defined]
        assert isinstance(mine, Dictionary) and mine.nbytes <= other.nbytes
        errors = [float((form.decode() - weight).square().sum()) for form in (mine, other)]
        assert errors[0] < share * errors[1]


@pytest.mark.parametrize("bits", [16, 4])
def test_knowing_the_inputs_lowers_the_error_on_other_tokens(
    bits: int, weight: Tensor, moments: Any, site: Any
) -> None:
    """Ablation: the weight coded as it is."""
    fit, held = moments(72)
    known = site(torch.ones(40), fit)
    options = f"atoms=16,block=24,kept=4,bits={bits}"
    errors = [
        loss(encode(f"{options},curvature={c}", weight, known).decode() - weight, held) for c in ("inputs", "none")
    ]
    assert errors[0] < 0.7 * errors[1]
