"""SparseGPT: entries are removed, and the kept ones rounded, column by column; those still to come compensate.

    minimise tr(D H D^T),   D = W' - W [m, n],   H = E[x x^T] [n, n],   H^-1 = U^T U, U upper triangular

Columns are taken left to right in blocks. On entering a block the entries of smallest ``W_ij^2 / U_jj^2`` go,
W as updated so far (within the four columns, as each four are entered, for ``2:4``). Then for each column j

    q = W_j where kept (the nearest grid point if values are codes), 0 where pruned
    e = (W_j - q) / U_jj,     W_{:, j+1:} -= e U_{j, j+1:}

and ``tr(D H D^T) = sum of all e^2`` for the damped H: nothing but each entry's own error, given what it could pass on,
is left. O(n^3 + m n^2).

Source: E. Frantar, D. Alistarh, *SparseGPT*, arXiv 2301.00774, whose joint quantization rounds kept entries inside the
same pass, as here. Choices of ours:
- a block has 16 columns, where the paper's code has 128: the score takes an entry to go alone, and in a wide block the
  many that go together, mostly on its left, overrate what is left to compensate. On docs-lm at sparsity 0.5 and 2 bits
  the predicted damage of nine matrices is 211 / 204 / 194 / 189 / 187 thousandths for blocks of 128 / 64 / 32 / 16 / 8;
- ``pattern=matrix`` compares all rows of a block together, as the paper does; ``row`` within each row. A matrix of more
  than 2 million weights is done in runs of rows, compared within a run;
- grids are static, and fitted to what pruning without rounding leaves: one pass to learn it, one to round. The grid has
  a hole around zero, as pruned weights have (``encoding.signed``);
- an input that no token reached is uncorrelated with the others and of mean square, where the paper sets its column to
  zero; when the factorisation fails, damping rises tenfold;
- no kept value outgrows the largest weight of its matrix: compensation of many collinear inputs could;
- a site that keeps only ``diag H`` is pruned by the same score and passes nothing on.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from layerwise.roles import Encoder
from layerwise.technique import SECOND_MOMENT, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout
    from layerwise.encoding.signed import FittedSigned
    from layerwise.prune._storage import Storage

TILE = 128  # columns of a pass where the block does not say: 2:4 masks are chosen four columns at a time
MENU = (
    "pattern=2:4,bits=1,group=128",
    "sparsity=0.5,bits=1,group=128",
    "pattern=2:4,bits=2,group=128",
    "sparsity=0.4,bits=2,group=128",
    "sparsity=0.3,bits=3,group=128",
)
log = logging.getLogger(__name__)


@technique(paper="SPARSEGPT", needs={SECOND_MOMENT}, menu=MENU)
class SparseGpt(Encoder):
    """Pruning, and rounding in the same pass, whose errors later columns absorb."""

    sparsity: float = option(0.5, minimum=0, maximum=0.99, help="share of the weights that are removed")
    pattern: str = option("matrix", choices=("row", "matrix", "2:4"), help="what a weight is compared within")
    bits: int = option(16, minimum=1, maximum=16, help="bits of a kept value: 1 to 8, or 16 as it is")
    group: int = option(64, minimum=0, help="columns that share a scale; 0 = the whole row")
    scale_bits: int = option(16, choices=(8, 16), help="bits of a stored scale")
    dtype: str = option("float16", choices=("float16", "bfloat16"), help="type of a value kept as it is")
    block: int = option(16, minimum=1, help="columns whose entries to remove are chosen together (2:4: always four)")
    damp: float = option(0.01, minimum=0, maximum=10, help="share of mean(diag H) added to the diagonal")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._storage()

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        from layerwise.encoding.grid import check_weight
        from layerwise.encoding.signed import fit_signed
        from layerwise.encoding.sparse import Sparse

        check_weight(weight)
        storage, block = self._storage(), TILE if self.pattern == "2:4" else self.block
        upper = statistics.remembered(
            ("sparsegpt", self.damp),
            weight.shape[1],
            lambda: inverse_factor(statistics.inputs, self.damp, weight),
            source=statistics.inputs,
        )
        pruned, mask, _ = prune(weight, upper, self.sparsity, self.pattern, block)
        if storage.grid is None:
            return storage.values(pruned, mask)
        own = upper if upper.dim() == 1 else upper.diagonal()
        fitted = fit_signed(pruned, mask, storage.grid, own**-2)
        _, mask, codes = prune(weight, upper, self.sparsity, self.pattern, block, fitted)
        return Sparse.from_codes(codes, mask, storage.positions, fitted)

    def layout(self, rows: int, columns: int) -> Layout:
        return self._storage().layout(rows, columns)

    def _storage(self) -> Storage:
        from layerwise.prune._storage import Storage

        return Storage(self.sparsity, self.pattern, self.bits, self.group, self.scale_bits, self.dtype)


def inverse_factor(moment: Tensor, damp: float, weight: Tensor) -> Tensor:
    """U of ``H^-1 = U^T U``, H over its mean diagonal and damped: float64 [n, n] upper triangular, or its diagonal.

    The diagonal [n] alone where only the diagonal of H is kept. Raises ``InputError`` for statistics that do not fit.
    """
    import torch

    from layerwise.calibrate.statistics import diagonal
    from layerwise.errors import InputError
    from layerwise.prune._masks import known_squares

    columns = weight.shape[1]
    squares = known_squares(diagonal(moment), columns)
    if moment.dim() == 1:
        return (squares + damp).rsqrt()
    if tuple(moment.shape) != (columns, columns) or not bool(torch.isfinite(moment).all()):
        raise InputError(f"the second moment of {columns} inputs must be as many finite rows and columns")
    given = diagonal(moment).double()
    reached = given > 0
    matrix = moment.double() / (given[reached].mean() if bool(reached.any()) else 1.0)
    matrix = torch.where(reached[:, None] & reached, matrix, 0.0)
    matrix.diagonal().copy_(squares)
    share, added = damp, 0.0
    while True:
        matrix.diagonal().add_(share - added)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return upper.contiguous()
        added, share = share, max(share * 10, 1e-8)
        log.info("a second moment of %d columns is not positive: damping raised to %g", columns, share)


def prune(
    weight: Tensor, upper: Tensor, sparsity: float, pattern: str, block: int, fitted: FittedSigned | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass: (W' float32, mask bool, codes uint8), all [m, n]; codes are zeros where no grid was given."""
    import torch

    from layerwise.encoding.grid import row_pieces

    pruned = torch.empty(weight.shape)
    mask = torch.empty(weight.shape, dtype=torch.bool)
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    done, limit = 0, float(weight.abs().max())
    for piece in row_pieces(*weight.shape):
        part = weight[piece].detach().double().T.contiguous()
        quotas = _quotas(piece, weight.shape, sparsity, pattern, block, done)
        grid = None if fitted is None else fitted.select(piece)
        kept, found = _pass(part, upper, quotas, pattern, block, limit, grid)
        pruned[piece], mask[piece], codes[piece] = part.T.float(), kept.T, found.T
        done += sum(quotas)
    return pruned, mask, codes


def _quotas(piece: slice, shape: tuple[int, ...], sparsity: float, pattern: str, block: int, done: int) -> list[int]:
    """How many entries go in each block of columns: of the piece's rows together, or of each of its rows.

    Cut so that they add up to exactly what the matrix, or each row, has to lose.
    """
    from layerwise.prune._masks import pruned_of

    columns = shape[1]
    ends = [*range(block, columns, block), columns]
    if pattern == "matrix":
        total = pruned_of(piece.stop * columns, sparsity) - done  # of the rows so far, less what went before
    else:
        total = pruned_of(columns, sparsity)
    sums = [total * end // columns for end in ends]
    return [b - a for a, b in zip([0, *sums], sums, strict=False)]


def _pass(
    current: Tensor,
    upper: Tensor,
    quotas: list[int],
    pattern: str,
    block: int,
    limit: float,
    fitted: FittedSigned | None,
) -> tuple[Tensor, Tensor]:
    """Prune ``current`` [n, m] float64 in place; returns (mask, codes), transposed like it."""
    import torch

    from layerwise.encoding.grid import group_of
    from layerwise.encoding.sparse_loops import prune_columns
    from layerwise.prune._masks import largest

    columns, rows = current.shape
    kept = torch.zeros(columns, rows, dtype=torch.bool)
    codes = torch.zeros(columns, rows, dtype=torch.uint8)
    levels, steps, floors, groups = 0, torch.empty(1, 1), torch.empty(1, 1), torch.zeros(columns, dtype=torch.int64)
    if fitted is not None:
        levels, groups = fitted.grid.levels, group_of(columns, fitted.grid.columns_of(columns))
        steps, floors = fitted.steps().T.contiguous(), fitted.floors().T.contiguous()
    grid = (levels, steps.numpy(), floors.numpy(), groups.numpy(), codes.numpy())
    whole = upper.dim() == 2
    for quota, first in zip(quotas, range(0, columns, block), strict=True):
        last = min(first + block, columns)
        own = upper[first:last, first:last] if whole else torch.diag(upper[first:last])
        if pattern != "2:4":
            score = (current[first:last] / own.diagonal()[:, None]).square().T  # [m, width]
            score = score.reshape(1, -1) if pattern == "matrix" else score.contiguous()
            chosen = largest(score, score.shape[1] - quota)
            kept[first:last] = chosen.view(rows, last - first).T
        errors = torch.empty(last - first, rows, dtype=torch.float64)
        part = (current.numpy(), kept.numpy(), own.contiguous().numpy(), first, pattern == "2:4", limit)
        prune_columns(*part, *grid, errors.numpy())
        if whole and last < columns:
            current[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
    return kept, codes
