"""HAWQ: bits follow the sharpness of the loss, the largest eigenvalue of each layer's Hessian block.

    rule=order     S_i = lambda_i / n_i, sorted; a higher S gets at least as many bits. The paper fixes only this order
                   and leaves the levels to its user: here the sites of highest S are raised to the next level until
                   the bytes are spent (``plan/order.py``).
    rule=knapsack  the least sum of 1/2 lambda_i ||Q_b(W_i) - W_i||^2 within the bytes, over all candidates, exactly:
                   the paper's order of fine-tuning, taken as the damage of an integer program as HAWQ-V3 does.
    kind=trace     HAWQ-V2: the mean eigenvalue tr(Hess_i) / n_i in the place of lambda_i; as an order it is not divided
                   by n_i again.

Eigenvalues are those of the Gauss-Newton block in Kronecker form (``sensitivity/hessian.py``), not of the exact block;
all candidates are weights only, activations stay as they are, and nothing is fine-tuned in between.

Measured on docs-lm (5 blocks, linears at 2 or 4 bits, half the weights at 4): KL 0.185 by lambda / n, 0.142 by the
mean eigenvalue, 0.261 for random orders, 0.332 for lambda / n reversed, 0.130 by layerwise's own score a byte.

Sources: Z. Dong et al., HAWQ, arXiv 1905.03696; HAWQ-V2, arXiv 1911.03852; HAWQ-V3, arXiv 2011.10680.
"""

from __future__ import annotations

from layerwise.plan.measures import Measures, asked
from layerwise.plan.order import Level, differing, least_sum, ordered_plan, read_levels, sum_of
from layerwise.plan.tree import Allocation, Node
from layerwise.roles import Allocator
from layerwise.technique import GRADIENT_MOMENT, option, technique


@technique(
    paper="HAWQ",
    needs={GRADIENT_MOMENT},
    left_out="the order of fine-tuning",
)
class Hawq(Allocator):
    """Bits by the top eigenvalue of each layer's Hessian block, relative to the layer's size."""

    rule: str = option("order", choices=("order", "knapsack"), help="raise by the order, or solve for the least sum")
    kind: str = option("eigenvalue", choices=("eigenvalue", "trace"), help="largest eigenvalue (V1) or the mean (V2)")
    levels: str = option("2/3/4/5/6/8/16", help="bits a weight that the order raises sites through")

    def __post_init__(self) -> None:
        super().__post_init__()
        read_levels(self.name, self.levels)

    def allocate(self, tree: Node, budget: int, measures: Measures | None = None) -> Allocation:
        known = asked(measures, self.name)
        if self.rule == "knapsack":
            return least_sum(tree, budget, known.scores(self._scorer))

        def order(low: Level, high: Level) -> list[list[str]]:
            sharp = self.sharpness(known)
            return [[site] for site in sorted(differing(low, high), key=lambda s: -sharp.get(s, 0.0))]

        return ordered_plan(tree, budget, read_levels(self.name, self.levels), known.places, order)

    def sharpness(self, measures: Measures) -> dict[str, float]:
        """Site -> what the order sorts by."""
        if self.kind == "trace":
            return {site: found.mean for site, found in measures.hessians().items()}
        places = measures.places
        return {site: found.eigenvalue / places[site].parameters for site, found in measures.hessians().items()}

    def objective(self, tree: Node, allocation: Allocation, measures: Measures | None = None) -> float:
        """The sum of scores; an order has no sum, and wants as many bytes raised as fit."""
        if self.rule == "knapsack":
            return sum_of(allocation, asked(measures, self.name).scores(self._scorer))
        return -float(allocation.bytes)

    @property
    def _scorer(self) -> str:
        return f"hessian_norm:kind={self.kind}"
