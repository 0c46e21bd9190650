"""DSFormer: a weight as a small dense matrix times a sparse one, so that each row has a subspace of its own.

    W[:, b] ~ S_b D_b,   D_b [k, w] dense,   S_b [m, k] with ``kept`` = s entries a row,   b a block of w columns

Low rank forces all rows into one k-dimensional space; here every row chooses its own s of the k atoms of its block.
Stored are ``k w`` numbers of D and, for every row, s coefficients and s places of log2 k bits each.

Fit: the errors of blocks meet in the outputs. With C = E[x x^T] = R^T R (R upper triangular) and e the error of a row,

    tr(E C E^T) = sum_rows sum_b ||R_bb e_b + R_b> e_>||^2        (> : the columns behind block b)

so blocks are coded last to first, each against ``w_b - R_bb^-1 R_b> e_>``: what the later ones left is absorbed.
In the coordinates R_bb, ``rounds`` times: every row picks atoms by orthogonal matching pursuit; atoms are solved for by
least squares; an atom that nobody uses becomes the row that is coded worst; the best round is kept. At the end
coefficients are rounded and the atoms of all blocks solved for once more, so that they take up that error.

Source: R. Chand, Y. Prabhu, P. Kumar, *DSFormer: Effective Compression of Text-Transformers by Dense-Sparse Weight
Factorization*, arXiv 2312.13211, from its abstract and a public summary (a dense basis for each block, sparse
coefficients for each row). Ours: the data (``curvature=inputs``; ``none`` codes the weight as it is), the fit above,
few bits for both factors. The paper trains the supports on the task by a straight-through step.

Measured on docs-lm (KL, MB): 16 atoms, blocks of 16, 4 kept: 1.05 at 1.10; 32 atoms, blocks of 32, 8 kept:
0.73 at 1.30; rounded integers in the same bytes 0.21 and 0.053. On these small matrices atoms are half of the bytes. At
equal bytes, indices included, the squared error of a matrix without structure is below the plain SVD's (a test).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Encoder
from layerwise.technique import SECOND_MOMENT, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout
    from layerwise.factorize._dictionary import DictionaryPlan


@technique(
    paper="DSFormer",
    needs={SECOND_MOMENT},
    menu=("atoms=16,block=16,kept=4,bits=4", "atoms=32,block=32,kept=8,bits=4"),
    left_out="training the sparse supports on the task's loss through a straight-through step",
)
class Dsformer(Encoder):
    """A few atoms of a small dictionary for every row, block by block."""

    atoms: int = option(32, minimum=1, maximum=256, help="atoms of a block's dictionary")
    block: int = option(32, minimum=1, help="columns of a block; the last may be short")
    kept: int = option(8, minimum=1, maximum=256, help="atoms that a row is the sum of, in each block")
    bits: int = option(16, choices=(2, 3, 4, 5, 6, 8, 16), help="bits of a coefficient; 16 = fp16")
    group: int = option(0, minimum=0, help="coefficients of a row that share a scale; 0 = all")
    atom_bits: int = option(8, choices=(4, 5, 6, 8, 16), help="bits of an atom's entries; 16 = fp16")
    curvature: str = option("inputs", choices=("inputs", "none"), help="what errors are weighed by")
    rounds: int = option(8, minimum=1, maximum=100, help="times coefficients and atoms are fitted to each other")
    damp: float = option(1e-2, minimum=1e-6, maximum=10, help="share of mean(diag C) added to the diagonal of C")

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        from layerwise.encoding.grid import check_weight
        from layerwise.factorize._dictionary import fit_dictionary
        from layerwise.factorize._whitening import Curvature, flat
        from layerwise.quantize._rounding import check_statistics

        check_weight(weight)
        check_statistics(weight, statistics)
        columns = weight.shape[1]
        moment = flat(columns) if self.curvature == "none" else Curvature.of(statistics.inputs, self.damp)
        return fit_dictionary(weight, moment, self._plan(columns), self.rounds)

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.factorize._dictionary import fitted_layout

        return fitted_layout(rows, columns, self._plan(columns))

    def _plan(self, columns: int) -> DictionaryPlan:
        from layerwise.factorize._dictionary import DictionaryPlan

        block = min(self.block, columns)
        return DictionaryPlan(
            self.atoms, block, min(self.kept, self.atoms, block), self.bits, self.group, self.atom_bits
        )
