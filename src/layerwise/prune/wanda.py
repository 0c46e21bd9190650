"""Wanda: the weights that contribute least to their output go.

    keep the entries of largest  S_ij = |W_ij| sqrt(H_jj),   H = E[x x^T]       W [m, n]

compared within a row (``pattern=row``, the paper's) or within each four columns (``2:4``). Where the inputs are
uncorrelated this minimises ``tr(D H D^T)``, ``D = W' - W``, over all masks of that size. Kept values do not change but
for the rounding, if any, to codes (``encoding.signed``), whose grid is fitted with ``H_jj`` as importance.

Source: M. Sun et al., *A Simple and Effective Pruning Approach for Large Language Models*, arXiv 2306.11695. Choices of
ours: statistics are of the dense network unless the run is sequential, where the paper takes those behind the pruned
blocks; an input that no token reached counts as the mean of the others (by the paper's formula its whole column would
go, on no evidence); equal scores keep the entry further left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Encoder
from layerwise.technique import INPUT_SQUARES, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout
    from layerwise.prune._storage import Storage

MENU = (
    "pattern=2:4,bits=1,group=128",
    "pattern=2:4,bits=2,group=128",
    "sparsity=0.4,bits=2,group=128",
    "sparsity=0.3,bits=3,group=128",
    "sparsity=0.2,bits=4,group=128",
)


@technique(paper="WANDA", needs={INPUT_SQUARES}, menu=MENU)
class Wanda(Encoder):
    """Keep the weights of largest magnitude times input norm."""

    sparsity: float = option(0.5, minimum=0, maximum=0.99, help="share of the weights that are removed")
    pattern: str = option("row", choices=("row", "2:4"), help="what a weight is compared within")
    bits: int = option(16, minimum=1, maximum=16, help="bits of a kept value: 1 to 8, or 16 as it is")
    group: int = option(64, minimum=0, help="columns that share a scale; 0 = the whole row")
    scale_bits: int = option(16, choices=(8, 16), help="bits of a stored scale")
    dtype: str = option("float16", choices=("float16", "bfloat16"), help="type of a value kept as it is")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._storage()

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        from layerwise.calibrate.statistics import diagonal
        from layerwise.encoding.grid import check_weight
        from layerwise.prune._masks import best_entries, known_squares

        check_weight(weight)
        squares = known_squares(diagonal(statistics.inputs), weight.shape[1])
        score = weight.detach().double().abs() * squares.sqrt()
        mask = best_entries(score, self.sparsity, self.pattern)
        return self._storage().rounded(weight, mask, squares)

    def layout(self, rows: int, columns: int) -> Layout:
        return self._storage().layout(rows, columns)

    def _storage(self) -> Storage:
        from layerwise.prune._storage import Storage

        return Storage(self.sparsity, self.pattern, self.bits, self.group, self.scale_bits, self.dtype)
