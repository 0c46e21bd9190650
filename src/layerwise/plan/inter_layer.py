"""Sensitivity with cross terms: errors of different layers meet, which no per-layer Hessian sees.

    s_i = 1/2 (tr(Hess_i) / n_i) ||Q_p(W_i) - W_i||^2      the layer by itself, by its mean Hessian eigenvalue
    a_i = s_i + 1/2 sum over j of I_ij,   I_ij = L_ij - L_i - L_j           with what it adds together with others

L_S is the measured loss with the sites S at precision p and all else dense. The least harmful sites are lowered first;
within a byte budget the shortest prefix of that order that fits is lowered, which is the order from the other end:
the largest a_i is raised first until the bytes are spent (``plan/order.py``).

    cross=rest   sum over j of I_ij = L(all) - L(all but i) - L_i, exact where the loss is quadratic: 2 N + 1 runs
    cross=pairs  every pair measured: N (N + 1) / 2 runs
    cross=none   a_i = s_i, the order of the Hessian alone

The abstract fixes augmented scores, an ordering and a bisection on a measured metric; the form of the cross term (as
in CLADO, arXiv 2307.05657) and the byte budget in place of the metric are chosen here. A cross term may be negative:
errors that cancel make a site cheaper to lower. Differences of losses are noisy, and the sign is kept. A score of one
number a site cannot say with which others it meets: where strong cross terms have either sign the order is worse than
that of the Hessian alone (seen on made-up quadratic losses).

Measured on docs-lm at 2 bits: the sites' own rises add up to 0.479 and all of them together to 0.465, so there is
little interaction to find; with half the weights at 4 bits the cross terms lower KL from 0.202 to 0.159, with a quarter
or three quarters they do not.

Source: C. Schaefer et al., Augmenting Hessians with Inter-Layer Dependencies, arXiv 2306.04879.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from layerwise.plan.measures import Measures, asked
from layerwise.plan.order import Level, differing, ordered_plan, read_levels, score_of
from layerwise.plan.tree import Allocation, Node
from layerwise.roles import Allocator
from layerwise.technique import GRADIENT_MOMENT, MEASURED_RISES, option, technique

SCORER = "hessian_norm:kind=trace"


@technique(
    paper="Inter-layer augmented Hessian MP-PTQ",
    needs={GRADIENT_MOMENT, MEASURED_RISES},
    left_out="the bisection on accuracy; the order is cut where the bytes fit",
)
class InterLayer(Allocator):
    """Order by Hessian trace and measured cross terms; the least harmful sites are lowered."""

    cross: str = option("rest", choices=("rest", "pairs", "none"), help="how interactions are measured")
    levels: str = option("2/4/8/16", help="bits a weight; the budget lies between two of them")

    def __post_init__(self) -> None:
        super().__post_init__()
        read_levels(self.name, self.levels)

    def allocate(self, tree: Node, budget: int, measures: Measures | None = None) -> Allocation:
        known = asked(measures, self.name)

        def order(low: Level, high: Level) -> list[list[str]]:
            sites = differing(low, high)
            scores = known.scores(SCORER)
            own = {site: score_of(scores, site, low[site]) for site in sites}
            lowered = {site: low[site].recipe for site in sites}
            added = interactions(known, lowered, self.cross)
            return [[site] for site in sorted(sites, key=lambda s: -(own[s] + 0.5 * added[s]))]

        return ordered_plan(tree, budget, read_levels(self.name, self.levels), known.places, order)

    def objective(self, tree: Node, allocation: Allocation, measures: Measures | None = None) -> float:
        """An order has no sum to make small: it wants as many bytes raised as fit."""
        return -float(allocation.bytes)


def interactions(measures: Measures, lowered: dict[str, str], cross: str) -> dict[str, float]:
    """Site -> sum over the other sites of what lowering both costs beyond lowering each (site -> recipe)."""
    sites = list(lowered)
    if cross == "none" or len(sites) < 2:
        return dict.fromkeys(sites, 0.0)

    def losses(groups: Sequence[Sequence[str]]) -> list[float]:
        return measures.rises([{site: lowered[site] for site in group} for group in groups])

    alone = dict(zip(sites, losses([[site] for site in sites]), strict=True))
    if cross == "rest":
        (whole,) = losses([sites])
        others = losses([[s for s in sites if s != site] for site in sites])
        return {site: whole - other - alone[site] for site, other in zip(sites, others, strict=True)}
    added = dict.fromkeys(sites, 0.0)
    pairs = list(combinations(sites, 2))
    for (a, b), together in zip(pairs, losses(pairs), strict=True):
        meeting = together - alone[a] - alone[b]
        added[a] += meeting
        added[b] += meeting
    return added
