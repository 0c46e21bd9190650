"""PHNN: a weight as a few Kronecker products, small matrices that mix blocks which are shared.

    W ~ sum_t A_t (x) S_t,    A_t [p, q],   S_t [m / p, n / q],   p = gcd(m, order),   q = gcd(n, order)

The A_t say how p x q blocks of channels multiply (for order 4 quaternions are the special case in which they are
fixed), the S_t are the weights that all blocks share. With T = order terms, ``1 / order`` of the values are stored.

The paper trains A and S from scratch. Here they are fitted to a trained weight. Write block (a, b) of W as row (a, b)
of ``K`` [p q, m n / (p q)]; a sum of T Kronecker products is a matrix of rank T there, so its truncated SVD is the best
of them, and what is lost is ``sum_{t > T} sigma_t^2``. Then ``rounds`` times, by least squares under the second moment
C of the inputs, with C_bc [n / q, n / q] its blocks, minimising tr(D C D^T) for D = W' - W:

    S M = N,   M_st = sum_{a, b, c} A_s[a, b] A_t[a, c] C_bc,   N_t = sum_{a, b, c} W_ab C_bc A_t[a, c]
    and, S fixed, for each block row a:   sum_{t, c} A_t[a, c] tr(S_s C_bc S_t^T) = tr(S_s sum_c C_bc W_ac^T)

S has M as the second moment of its own inputs, so that below 16 bits it is rounded with feedback against M, and A is
solved for the rounded S. Neither step raises the objective, but for rounding; the best round is kept.

Source: E. Grassucci, A. Zhang, D. Comminiello, *PHNNs: Lightweight Neural Networks via Parameterized Hypercomplex
Convolutions*, arXiv 2110.04176. Ours: the fit to a trained weight, T as a choice, blocks in few bits, A in
float32 (T p q numbers in all). A trained weight is far from a sum of few Kronecker products, so
without training this loses much: it is here to be measured, and to start training from.

Measured on docs-lm (KL, MB): order 2, 4 bits: 2.76 at 0.970; order 2 with three of the four possible terms, 3
bits: 1.09 at 1.058; plain SVD factors 2.70 at 0.971; rounded integers 0.469 at 0.971 and 0.372 at 1.069.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Encoder
from layerwise.technique import SECOND_MOMENT, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout


@technique(
    paper="PHNN",
    needs={SECOND_MOMENT},
    menu=("order=2,bits=4", "order=2,terms=3,bits=3"),
    left_out="training from scratch, and convolutions in which the kernel's own axes stay outside the products",
)
class Phnn(Encoder):
    """A sum of Kronecker products in place of a weight."""

    order: int = option(4, minimum=1, maximum=64, help="blocks along each side, where it divides them")
    terms: int = option(0, minimum=0, maximum=4096, help="Kronecker products; 0 = as many as the order")
    bits: int = option(16, choices=(2, 3, 4, 5, 6, 8, 16), help="bits of the shared blocks; 16 = fp16")
    group: int = option(64, minimum=0, help="columns of the blocks that share a scale; 0 = the whole row")
    rounds: int = option(4, minimum=0, maximum=100, help="times both factors are fitted to what the inputs are")
    damp: float = option(1e-3, minimum=1e-6, maximum=10, help="share of mean(diag C) added to the diagonal of C")

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        from layerwise.encoding.grid import check_weight
        from layerwise.factorize._kronecker import fit_kronecker
        from layerwise.factorize._whitening import Curvature
        from layerwise.quantize._rounding import check_statistics

        check_weight(weight)
        check_statistics(weight, statistics)
        moment = Curvature.of(statistics.inputs, self.damp)
        return fit_kronecker(weight, moment, self._cut(*weight.shape), self.bits, self.group, self.rounds)

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.factorize._kronecker import fitted_layout

        return fitted_layout(rows, columns, self._cut(rows, columns), self.bits, self.group)

    def _cut(self, rows: int, columns: int) -> tuple[int, int, int]:
        """(p, q, T): blocks along the rows and the columns, and products."""
        from math import gcd

        p, q = gcd(rows, self.order), gcd(columns, self.order)
        return p, q, min(self.terms or self.order, p * q)
