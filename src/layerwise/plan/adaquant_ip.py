"""AdaQuant's integer program: bits from the measured loss of quantizing one layer at a time (part B of the paper).

    dL_lk = max(loss with layer l alone at candidate k - loss, 1e-6)
    min sum x_lk dL_lk   subject to   sum_k x_lk = 1,  sum x_lk bytes_lk <= budget,  x binary

Every candidate of every site is stored alone in the network, which is then run on tokens that no encoder and no
damage has seen. Chosen here: all else is dense, where the paper leaves the rest at 8 bits, since our loss of the dense
network is exactly zero; weights only, where the paper changes a layer's activations along with them. The program is
the planner's own (one choice a site under one budget) and is solved by it, exactly; in a test ``scipy.optimize.milp``
finds the same optimum. A candidate at 16 bits is given the smallest rise without a run.

Limits: errors of several layers are added up as if they never met, and a rise below the noise of the tokens is noise.
A rewritten block cannot be measured one site at a time, so candidates behind rewrites are refused.

Measured on docs-lm against plans by predicted damage: equal at 4 and 3 bits, 7 % less KL at 2, where changes are too
large for a second-order prediction; it costs a run of the network for every candidate of every site.

Source: I. Hubara et al., Improving Post Training Neural Quantization, arXiv 2006.10518, and its code.
"""

from __future__ import annotations

from layerwise.plan.constraints import is_dense
from layerwise.plan.measures import Measures, asked
from layerwise.plan.order import Scores, in_place, least_sum, sum_of
from layerwise.plan.tree import Allocation, Node, leaves
from layerwise.roles import Allocator
from layerwise.technique import MEASURED_RISES, technique

LEAST = 1e-6  # of a rise; what is measured below it, or below zero, is noise


@technique(paper="AdaQuant", needs={MEASURED_RISES})
class AdaquantIp(Allocator):
    """The least sum of measured single-site losses within the bytes, by an exact integer program."""

    def allocate(self, tree: Node, budget: int, measures: Measures | None = None) -> Allocation:
        return least_sum(tree, budget, rises(tree, asked(measures, self.name)))

    def objective(self, tree: Node, allocation: Allocation, measures: Measures | None = None) -> float:
        """The sum of measured rises."""
        return sum_of(allocation, rises(tree, asked(measures, self.name)))


def rises(tree: Node, measures: Measures) -> Scores:
    """Site -> recipe -> measured rise of the loss; sites that the loss does not reach are left out."""
    pairs = [
        (leaf.name, c.recipe)
        for leaf in leaves(in_place(tree))
        if measures.places[leaf.name].reached
        for c in leaf.candidates
    ]
    run = [pair for pair in dict.fromkeys(pairs) if not is_dense(pair[1])]
    found: dict[str, dict[str, float]] = {site: {} for site, _ in pairs}
    for site, recipe in pairs:
        found[site][recipe] = LEAST
    for (site, recipe), rise in zip(run, measures.rises([{site: recipe} for site, recipe in run]), strict=True):
        found[site][recipe] = max(rise, LEAST)
    return found
