"""Fitting block dictionaries and sparse coefficients to a weight; formulas as in ``factorize/dsformer.py``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.encoding.dense import Dense, dense_layout
from layerwise.encoding.dictionary import Dictionary, dictionary_layout
from layerwise.encoding.encoded import Encoded, Layout
from layerwise.encoding.grid import Grid, fit_grid, round_to_grid
from layerwise.encoding.integer import GroupedInteger, integer_layout
from layerwise.factorize._whitening import Curvature

RIDGE = 1e-8  # share of an atom's square that keeps coefficients of parallel atoms finite


@dataclass(frozen=True)
class DictionaryPlan:
    """k ``atoms`` and ``kept`` of them a row, in blocks of ``block`` columns; bits of both factors."""

    atoms: int
    block: int
    kept: int
    bits: int
    group: int
    atom_bits: int

    def cuts(self, columns: int) -> list[slice]:
        return [slice(a, min(a + self.block, columns)) for a in range(0, columns, self.block)]


def fit_dictionary(weight: Tensor, moment: Curvature, plan: DictionaryPlan, rounds: int) -> Dictionary:
    """The form: blocks coded last to first, coefficients rounded, atoms solved for once more."""
    dense = weight.double()
    rows, columns = dense.shape
    root = torch.linalg.cholesky(moment.times(torch.eye(columns, dtype=torch.float64)), upper=True)
    cuts = plan.cuts(columns)
    coefficients = torch.zeros(rows, len(cuts), plan.kept, dtype=torch.float64)
    places = torch.zeros(rows, len(cuts), plan.kept, dtype=torch.int64)
    error = torch.zeros_like(dense)
    for b in reversed(range(len(cuts))):
        own, seen = root[cuts[b], cuts[b]], in_root(dense, error, root, cuts[b])
        atoms, found, chosen = learn(seen, plan.atoms, plan.kept, rounds)
        # A dictionary in the range of fp16 on both sides: half of the largest coefficient's size to each.
        share = found.abs().amax().clamp(min=1e-300).sqrt()
        coefficients[:, b], places[:, b] = found / share, chosen
        error[:, cuts[b]] = spread(found, chosen, plan.atoms) @ unrooted(atoms, own) - dense[:, cuts[b]]
    places, order = places.sort(dim=2)
    coefficients = coefficients.gather(2, order)
    stored = store_coefficients(coefficients.flatten(1), plan)
    values = stored.decode().double().view(coefficients.shape)
    atoms = torch.zeros(plan.atoms, columns, dtype=torch.float64)
    error.zero_()
    for b in reversed(range(len(cuts))):
        own, seen = root[cuts[b], cuts[b]], in_root(dense, error, root, cuts[b])
        codes = spread(values[:, b], places[:, b], plan.atoms)
        atoms[:, cuts[b]] = unrooted(solve_atoms(codes, seen), own)
        kept = store_atoms(atoms[:, cuts[b]], plan).decode().double()
        error[:, cuts[b]] = codes @ kept - dense[:, cuts[b]]
    return Dictionary.of(stored, places.flatten(1), store_atoms(atoms, plan), plan.block)


def fitted_layout(rows: int, columns: int, plan: DictionaryPlan) -> Layout:
    """What ``fit_dictionary`` stores."""
    entries = plan.kept * len(plan.cuts(columns))
    coefficients = (
        dense_layout(rows, entries, torch.float16)
        if plan.bits == 16
        else integer_layout(coefficient_grid(plan), rows, entries)
    )
    atoms = (
        dense_layout(plan.atoms, columns, torch.float16)
        if plan.atom_bits == 16
        else integer_layout(atom_grid(plan), plan.atoms, columns)
    )
    return dictionary_layout(coefficients, atoms, rows, plan.atoms, entries)


def coefficient_grid(plan: DictionaryPlan) -> Grid:
    return Grid(plan.bits, plan.group, symmetric=True)


def atom_grid(plan: DictionaryPlan) -> Grid:
    """An atom has one scale in each block."""
    return Grid(plan.atom_bits, plan.block, symmetric=True)


def store_coefficients(values: Tensor, plan: DictionaryPlan) -> Encoded:
    if plan.bits == 16:
        return Dense.of(values, torch.float16)
    return nearest(values, coefficient_grid(plan))


def store_atoms(values: Tensor, plan: DictionaryPlan) -> Encoded:
    return Dense.of(values, torch.float16) if plan.atom_bits == 16 else nearest(values, atom_grid(plan))


def nearest(values: Tensor, grid: Grid) -> GroupedInteger:
    single = values.float().contiguous()
    fitted = fit_grid(single, grid, clip=True)
    return GroupedInteger.from_codes(round_to_grid(single, fitted), fitted)


# ---------------------------------------------------------------- one block


def in_root(dense: Tensor, error: Tensor, root: Tensor, cut: slice) -> Tensor:
    """``R_bb (w_b - R_bb^-1 R_b> e_>)`` for every row: what block b is coded against, [rows, w]."""
    return dense[:, cut] @ root[cut, cut].T - error[:, cut.stop :] @ root[cut, cut.stop :].T


def unrooted(atoms: Tensor, own: Tensor) -> Tensor:
    """Atoms in the coordinates of the weight: A R_bb^-T."""
    return torch.linalg.solve_triangular(own, atoms.T, upper=True).T


def learn(seen: Tensor, count: int, kept: int, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """(atoms [k, w] of unit norm, coefficients [rows, s], places [rows, s]): the best of ``rounds`` for ``seen``."""
    atoms = first_atoms(seen, count)
    best, least = None, float("inf")
    for _ in range(rounds):
        values, chosen = pursue(seen, atoms, kept)
        codes = spread(values, chosen, count)
        left = seen - codes @ atoms
        loss = float(left.square().sum())
        if loss < least:
            best, least = (atoms, values, chosen), loss
        solved = solve_atoms(codes, seen)
        unused = solved.norm(dim=1) <= 1e-12 * float(solved.norm(dim=1).max().clamp(min=1e-300))
        worst = left.square().sum(1).argsort(descending=True, stable=True)
        vacant = unused.nonzero()[:, 0][: len(worst)]
        solved[vacant] = seen[worst[: len(vacant)]]
        atoms = unit(solved)
    assert best is not None
    return best


def first_atoms(seen: Tensor, count: int) -> Tensor:
    """Rows of ``seen`` in an arbitrary but fixed order, and directions of no preference where there are too few."""
    generator = torch.Generator().manual_seed(count)
    picked = seen[torch.randperm(len(seen), generator=generator)[:count]]
    more = torch.randn(max(0, count - len(picked)), seen.shape[1], generator=generator, dtype=torch.float64)
    return unit(torch.cat([picked, more]))


def unit(atoms: Tensor) -> Tensor:
    norms = atoms.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, atoms / norms.clamp(min=1e-300), torch.zeros_like(atoms))


def pursue(seen: Tensor, atoms: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit, all rows at once: (coefficients [rows, s], places [rows, s], all different).

    Each step takes the atom of the largest inner product with what the atoms so far leave over.
    """
    rows = torch.arange(len(seen))
    gram, against = atoms @ atoms.T, seen @ atoms.T
    gram.diagonal().add_(RIDGE)
    left = against.clone()  # inner products of what is left with every atom
    chosen = torch.zeros(len(seen), kept, dtype=torch.int64)
    # Of each chosen atom what is orthogonal to the ones before it, over its norm: its products with every atom.
    base = torch.zeros(len(seen), kept, len(atoms), dtype=torch.float64)
    for t in range(kept):
        place = left.abs().scatter_(1, chosen[:, :t], -1.0).argmax(1)
        before = base[rows, :t, place]  # [rows, t]
        fresh = gram[place] - (before[:, None, :] @ base[:, :t])[:, 0]
        fresh /= fresh[rows, place].clamp(min=RIDGE).sqrt()[:, None]
        left -= left[rows, place][:, None] * fresh / fresh[rows, place].clamp(min=1e-300)[:, None]
        chosen[:, t], base[:, t] = place, fresh
    inner = gram[chosen[:, :, None], chosen[:, None, :]]
    values = torch.linalg.solve(inner, against.gather(1, chosen)[:, :, None])[:, :, 0]
    return values, chosen


def spread(values: Tensor, chosen: Tensor, count: int) -> Tensor:
    """S [rows, k] from its entries."""
    return torch.zeros(len(values), count, dtype=values.dtype).scatter_add_(1, chosen, values)


def solve_atoms(codes: Tensor, seen: Tensor) -> Tensor:
    """The atoms [k, w] of least ``||seen - codes A||_F``; an atom that no row uses is zero."""
    gram = codes.T @ codes
    mean = float(gram.diagonal().mean())
    if not mean > 0:
        return torch.zeros(codes.shape[1], seen.shape[1], dtype=seen.dtype)
    values, vectors = torch.linalg.eigh(gram / mean)
    inverse = torch.where(values > 1e-10 * values.max(), 1 / values, torch.zeros_like(values))
    return vectors @ (inverse[:, None] * (vectors.T @ (codes.T @ seen))) / mean
