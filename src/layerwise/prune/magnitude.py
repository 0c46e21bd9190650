"""Magnitude pruning: the smallest weights go.

    keep the entries of largest |W_ij|,  W' = W where kept, 0 elsewhere        W [m, n]

compared within a row (``pattern=row``), within the matrix (``matrix``) or within each four columns (``2:4``). For its
comparison group the kept set minimises ``||W - W'||_F`` over all sets of that size. Kept values are stored in 16 bits,
or as codes of a sign and a magnitude (``encoding.signed``). Bits per weight: ``density * bits`` and 1 for the mask (2/3
for 2:4), and the scales.

Source: S. Han et al., *Learning both Weights and Connections*, arXiv 1506.02626. There the network is trained again
after pruning; here nothing is trained. The gradual schedule and thresholds over the whole network are no encoders and
not here: what a matrix may keep is the plan's to say. Our choice: equal magnitudes keep the entry further left, so
counts are exact, as the bytes must be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Encoder
from layerwise.technique import option, technique

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


@technique(paper="MAGNITUDE", menu=MENU)
class Magnitude(Encoder):
    """Keep the largest weights; the floor that other pruning must beat."""

    sparsity: float = option(0.5, minimum=0, maximum=0.99, help="share of the weights that are removed")
    pattern: str = option("row", choices=("row", "matrix", "2:4"), help="what a weight is compared within")
    bits: int = option(16, minimum=1, maximum=16, help="bits of a kept value: 1 to 8, or 16 as it is")
    group: int = option(64, minimum=0, help="columns that share a scale; 0 = the whole row")
    scale_bits: int = option(16, choices=(8, 16), help="bits of a stored scale")
    dtype: str = option("float16", choices=("float16", "bfloat16"), help="type of a value kept as it is")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._storage()

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        from layerwise.encoding.grid import check_weight
        from layerwise.prune._masks import best_entries

        check_weight(weight)
        mask = best_entries(weight.detach().float().abs(), self.sparsity, self.pattern)
        return self._storage().rounded(weight, mask, None)

    def layout(self, rows: int, columns: int) -> Layout:
        return self._storage().layout(rows, columns)

    def _storage(self) -> Storage:
        from layerwise.prune._storage import Storage

        return Storage(self.sparsity, self.pattern, self.bits, self.group, self.scale_bits, self.dtype)
