"""One ranking of all weights of the network: LAMP, and plain global magnitude.

    score=lamp        Imp(w_(j)) = w_(j)^2 / sum_{i<=j} w_(i)^2     ranked over all matrices, the lowest go
    score=magnitude   w^2 ranked over all matrices

within a matrix both are the order of magnitudes; what they decide is how many entries each matrix keeps. They are a
plan over candidates of different sparsity, ``magnitude:sparsity=...,pattern=matrix``, with the least sum of the costs
of ``plan/energy.py``, whose docstring shows that this is the global threshold. Of the four groupings of magnitude
pruning the row and the matrix are patterns of the encoder ``magnitude``, and these two are plans.

LAMP does not change when a matrix is scaled; global magnitude does, and empties a layer whose weights are small
because another one undoes their scale. With the largest entry of every matrix at ``Imp = 1`` LAMP empties none.

Chosen here: bytes are the budget, not a count of zeros, so candidates that round may take part; tables are ranked with
the rest where they offer several candidates; no weight is trained again.

Measured on docs-lm, 16-bit values and a mask, in the bytes of uniform sparsity: see ``layerwise bench lamp`` and its
evidence. A plan by predicted damage (``pareto``) sees the loss, which magnitudes do not.

Sources: J. Lee et al., *Layer-adaptive sparsity for the Magnitude-based Pruning*, arXiv 2010.07611; S. Han et al.,
*Learning both Weights and Connections*, arXiv 1506.02626.
"""

from __future__ import annotations

from typing import ClassVar

from layerwise.plan.energy import KINDS, energy_costs
from layerwise.plan.measures import Measures, asked
from layerwise.plan.order import least_sum, sum_of
from layerwise.plan.sparsities import over
from layerwise.plan.tree import Allocation, Node
from layerwise.roles import Allocator
from layerwise.technique import option, technique


@technique(paper="MAGNITUDE")
class Lamp(Allocator):
    """One threshold over the weights of all matrices, by magnitude relative to what its matrix still holds."""

    score: str = option("lamp", choices=KINDS, help="relative to the layer's remaining squares, or as it is")
    over: ClassVar[tuple[str, ...]] = over("magnitude:pattern=matrix")

    def allocate(self, tree: Node, budget: int, measures: Measures | None = None) -> Allocation:
        return least_sum(tree, budget, energy_costs(asked(measures, self.name), self.score))

    def objective(self, tree: Node, allocation: Allocation, measures: Measures | None = None) -> float:
        """The sum of costs."""
        return sum_of(allocation, energy_costs(asked(measures, self.name), self.score))
