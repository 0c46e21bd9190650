"""The best low-rank matrix under two curvatures, and its factors in stored form: what the factorizations share.

    minimise tr(R D C D^T),   D = A B - W,   A [m, k],  B [k, n],   R [m, m],  C [n, n]

With roots ``R = S S^T`` and ``C = T T^T`` the objective is ``||S^T (A B - W) T||_F^2``, so the best A B of rank k comes
from the singular value decomposition ``S^T W T = U Sigma V^T``, and what is lost is ``sum_{i > k} sigma_i^2``. Only the
eigenvectors of the smaller Gram matrix are needed: for ``m <= n``, with ``Y = S^T W``,

    Y C Y^T = U Sigma^2 U^T,      A = S^-T U_k,      B = U_k^T Y      (B = Sigma_k V_k^T T^-1, without the inverse)

and the transposed problem where ``n < m``. Here A is scaled so that ``A^T R A = I``, and ``B C B^T = Sigma_k^2``.

When the factors are stored in few bits their errors are absorbed as those of a rounded weight are: to the error E of
one factor alone, the other held fixed at its stored values, the objective is again a two-sided quadratic form,

    E in A^T:  tr((B C B^T) E R E^T)          E in B:  tr((A^T R A) E C E^T)

so each factor is first solved for (least squares, given the other) and then rounded with feedback against these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.calibrate.statistics import SiteStatistics, diagonal
from layerwise.encoding.dense import Dense, dense_layout
from layerwise.encoding.encoded import Layout
from layerwise.encoding.grid import Grid, fit_grid, round_to_grid
from layerwise.encoding.integer import GroupedInteger, integer_layout
from layerwise.encoding.lowrank import LowRank, lowrank_layout
from layerwise.quantize._rounding import Side, factor, round_with_feedback


@dataclass(frozen=True, eq=False)
class Curvature:
    """One damped curvature over its mean diagonal, and a root of it: whole, diagonal, or nothing known (identity).

    side:     the factored matrix where it is stored whole, else None.
    squares:  its diagonal otherwise, float64 [n].
    """

    side: Side | None
    squares: Tensor

    @staticmethod
    def of(matrix: Tensor, damp: float) -> Curvature:
        """``matrix`` [n, n] or its diagonal [n], plus ``damp`` of its mean diagonal; without any mass, the identity."""
        squares = diagonal(matrix).double().clamp(min=0)
        mean = float(squares.mean())
        if not mean > 0:
            return flat(len(squares))
        # The largest first, as two-sided rounding takes them: the factors are then shared with it.
        side = factor(matrix, damp, largest_first=True)
        return Curvature(side, squares / mean + max(damp, 1e-9))

    def times(self, x: Tensor) -> Tensor:
        """The curvature times ``x`` [n, anything] float64."""
        if self.side is None:
            return self.squares[:, None] * x
        return torch.empty_like(x).index_copy_(0, self.side.order, self.side.matrix @ x[self.side.order])

    def root_times(self, x: Tensor) -> Tensor:
        """``S^T x`` for the root S, rows in an order of its own."""
        if self.side is None:
            return self.squares.sqrt()[:, None] * x
        return self.side.pivots.sqrt()[:, None] * (self.side.upper @ x[self.side.order])

    def root_solve(self, y: Tensor) -> Tensor:
        """The x with ``S^T x = y``."""
        if self.side is None:
            return y / self.squares.sqrt()[:, None]
        scaled = y / self.side.pivots.sqrt()[:, None]
        solved = torch.linalg.solve_triangular(self.side.upper, scaled, upper=True, unitriangular=True)
        return torch.empty_like(y).index_copy_(0, self.side.order, solved)

    def importance(self) -> Tensor:
        """What an own rounding error of each entry costs: float32 [n]."""
        return self.squares.float() if self.side is None else self.side.importance()


def curvatures(statistics: SiteStatistics, kind: str, damp: float, row_damp: float) -> tuple[Curvature, Curvature]:
    """(R, C): ``inputs`` takes R = I and C = E[x x^T], ``loss`` the two sides that know the network's loss."""

    def remembered(key: str, side: Tensor, share: float) -> Curvature:
        make: Callable[[], Curvature] = lambda: Curvature.of(side, share)  # noqa: E731
        return statistics.remembered((key, share, "curvature"), side.shape[0], make, source=side)

    if kind == "loss":
        return remembered("rows", statistics.rows, row_damp), remembered("columns", statistics.columns, damp)
    return flat(len(statistics.rows)), remembered("inputs", statistics.inputs, damp)


def flat(size: int) -> Curvature:
    """The identity: every entry matters alike."""
    return Curvature(None, torch.ones(size, dtype=torch.float64))


def best_factors(weight: Tensor, rows: Curvature, columns: Curvature, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A [m, k] with A^T R A = I, B [k, n] with B C B^T = Sigma_k^2, all sigma descending), float64."""
    if weight.shape[0] > weight.shape[1]:
        left, right, sigma = best_factors(weight.T, columns, rows, rank)
        kept = sigma[:rank].clamp(min=1e-300)
        return right.T / kept, left.T * kept[:, None], sigma
    seen = rows.root_times(weight.double().contiguous())  # Y [m, n]
    values, vectors = torch.linalg.eigh(seen @ columns.times(seen.T.contiguous()))
    chosen = vectors.flip(1)[:, :rank]
    return rows.root_solve(chosen.contiguous()), chosen.T @ seen, values.flip(0).clamp(min=0).sqrt()


def rank_of(ratio: float, rows: int, columns: int) -> int:
    """The rank whose factors hold ``ratio`` of the weight's values: floor(ratio m n / (m + n)), at least 1."""
    return max(1, min(rows, columns, int(ratio * rows * columns / (rows + columns))))


def store_factors(
    weight: Tensor, rows: Curvature, columns: Curvature, rank: int, bits: int, group: int, rounds: int = 1
) -> LowRank:
    """The best factors of ``weight`` at this rank, in 16 bits or rounded to ``bits`` with feedback ``rounds`` times."""
    left, right, _ = best_factors(weight, rows, columns, rank)
    if bits == 16:
        # Half of each singular value to each side: neither factor leaves the range of fp16 before the weight does.
        share = left.norm(dim=0).clamp(min=1e-300), right.norm(dim=1).clamp(min=1e-300)
        balance = (share[1] / share[0]).sqrt()[:, None]
        return LowRank(Dense.of(left.T * balance, torch.float16), Dense.of(right / balance, torch.float16))
    grid, dense = Grid(bits, group), weight.double()
    seen = columns.times(dense.T.contiguous())  # (W C)^T
    found: LowRank | None = None
    for _ in range(rounds):
        inner = right @ columns.times(right.T.contiguous())  # B C B^T
        turned = left.T if found is None else _solve(inner, right @ seen)
        stored_left = rounded(turned, Curvature.of(inner, 1e-6), rows, grid)
        left = stored_left.decode().double().T
        pulled = rows.times(left.contiguous())  # R A
        inner = left.T @ pulled  # A^T R A
        stored_right = rounded(_solve(inner, pulled.T @ dense), Curvature.of(inner, 1e-6), columns, grid)
        right = stored_right.decode().double()
        found = LowRank(stored_left, stored_right)
    assert found is not None
    return found


def rounded(weight: Tensor, rows: Curvature, columns: Curvature, grid: Grid, sweeps: int = 2) -> GroupedInteger:
    """``weight`` float64 on a grid, each error absorbed by entries still to come along both sides."""
    values = weight.float().contiguous()
    fitted = fit_grid(values, grid, clip=True, importance=columns.importance())
    if columns.side is None:
        return GroupedInteger.from_codes(round_to_grid(values, fitted), fitted)
    codes = round_with_feedback(values, fitted, columns.side, rows.side, sweeps=sweeps)
    return GroupedInteger.from_codes(codes, fitted)


def factors_layout(rows: int, columns: int, rank: int, bits: int, group: int) -> Layout:
    """What ``store_factors`` stores."""
    if bits == 16:
        return lowrank_layout(dense_layout(rank, rows, torch.float16), dense_layout(rank, columns, torch.float16))
    return lowrank_layout(*(integer_layout(Grid(bits, group), rank, side) for side in (rows, columns)))


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix^-1 right`` for a positive semi-definite matrix; a direction that is not there gets nothing."""
    mean = float(matrix.diagonal().mean())
    if not mean > 0:
        return torch.zeros_like(right)
    values, vectors = torch.linalg.eigh(matrix / mean)
    inverse = torch.where(values > 1e-10 * values.max(), 1 / values, torch.zeros_like(values))
    return vectors @ (inverse[:, None] * (vectors.T @ right)) / mean
