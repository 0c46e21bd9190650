"""SVD-LLM: factorize a weight where its inputs are white, so that a dropped singular value costs just its square.

    minimise tr(D H D^T) over rank k:   H = S S^T,   W S = U Sigma V^T,   W' = U_k Sigma_k V_k^T S^-1 = U_k U_k^T W
    loss = sum_{i > k} sigma_i^2,       k = floor(ratio m n / (m + n)) of W [m, n]

A [m, k] and B [k, n] are kept in place of W: ``ratio`` of its values, so 16 ``ratio`` bits a weight in 16 bits, and
both products of a vector cost ``ratio`` of one with W. Any root S of H gives the same W'; what runs is the eigenvalue
problem of the smaller of ``W H W^T`` and ``S^T W^T W S`` (see ``factorize._whitening``).

Source: X. Wang et al., *SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression*,
arXiv 2403.07378. Choices of ours:
- a damping of ``damp mean(diag H)``, where the paper shifts H only when it is not positive definite; 0 is the paper's;
- ``curvature=loss`` whitens both sides, ``R^(1/2) W C^(1/2)``: the best rank k for the loss itself, where the paper's
  objective takes every output to matter alike (``inputs``, the default);
- ``factor_bits`` below 16 stores the factors as grouped integers: each is rounded with feedback, the second after a
  least squares fit to the first;
- the paper's second step, refitting A layer by layer to the outputs behind the compressed prefix, is left to
  ``--sequential``, which encodes again from such inputs.

Measured on a causal LM of 2.4 M parameters (damage on other tokens, 14 of its linears): ratio 0.8 in 16 bits 0.044 with
``inputs``, 0.035 with ``loss``, where 2-bit integers of a sixth of the bytes leave 0.071 and 4-bit ones 0.004: factors
alone are for what lies below the smallest grid. There 3-bit factors serve best, 1.64 bits a weight: 0.156 at ratio 0.5;
0.81: 0.395 at ratio 0.25. Hence the menu.

A table is taken too, its rows weighed by their gradients under ``curvature=loss``; a side kept as its diagonal (over 16
thousand entries) is whitened by that diagonal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.roles import Encoder
from layerwise.technique import GRADIENT_MOMENT, SECOND_MOMENT, option, technique

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.calibrate.statistics import SiteStatistics
    from layerwise.encoding.encoded import Encoded, Layout


@technique(
    paper="SVD-LLM",
    needs={SECOND_MOMENT, GRADIENT_MOMENT},
    menu=tuple(f"ratio={ratio},factor_bits=3,curvature=loss" for ratio in (0.25, 0.4, 0.5)),
)
class SvdLlm(Encoder):
    """Two thin factors in place of a weight, truncated where its inputs are white."""

    ratio: float = option(0.8, minimum=0.001, maximum=4, help="share of the weight's values that the factors hold")
    factor_bits: int = option(16, choices=(2, 3, 4, 5, 6, 8, 16), help="bits of the factors; 16 = fp16")
    factor_group: int = option(64, minimum=0, help="columns of a factor that share a scale; 0 = the whole row")
    curvature: str = option("inputs", choices=("inputs", "loss"), help="what is whitened: inputs, or both sides")
    damp: float = option(1e-4, minimum=0, maximum=10, help="share of mean(diag H) added to the diagonal of H")
    row_damp: float = option(0.1, minimum=0, maximum=100, help="the same for the rows, with curvature=loss")
    rounds: int = option(4, minimum=1, maximum=20, help="times the rounded factors are fitted to each other")

    def encode(self, weight: Tensor, statistics: SiteStatistics) -> Encoded:
        from layerwise.encoding.grid import check_weight
        from layerwise.factorize._whitening import curvatures, rank_of, store_factors
        from layerwise.quantize._rounding import check_statistics

        check_weight(weight)
        check_statistics(weight, statistics)
        rows, columns = curvatures(statistics, self.curvature, self.damp, self.row_damp)
        rank = rank_of(self.ratio, *weight.shape)
        return store_factors(weight, rows, columns, rank, self.factor_bits, self.factor_group, self.rounds)

    def layout(self, rows: int, columns: int) -> Layout:
        from layerwise.factorize._whitening import factors_layout, rank_of

        return factors_layout(rows, columns, rank_of(self.ratio, rows, columns), self.factor_bits, self.factor_group)
