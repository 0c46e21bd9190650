"""LayerwiseQuant: whole blocks at one of two levels, ranked by one cheap number a block.

    score=lim  LIM_i = - mean over tokens of cos(h_in, h_out), the states that enter and leave block i: the less alike
               they are, the more the block does, the more bits it gets
    score=zd   ZD_i = share of the block's weights with (w - mean) / std > 1: the fewer, the more bits. No data;
               one-sided by definition, so ZD of -W differs from ZD of W.

The k most important blocks take the higher level and the rest the lower, k the largest that fits the bytes (not the
average bits: blocks need not be of equal size). The paper goes from 4 to 2 bits and from 8 to 4; the budget here
decides which pair of ``levels`` it lies between. Chosen here: what lies outside the blocks (tables) is raised
before any block, the paper leaves it at 16 bits; all linears of a block that are not searched keep their one form.

Measured on docs-lm with three of five blocks at 4 bits and the rest at 2: KL 0.145 by LIM, 0.153 by ZD, 0.279 on
average over random orders, 0.346 and 0.343 with the two orders reversed. A budget between two blocks leaves bytes
unused, so with few blocks the rule loses to uniform rounding with finer groups in as many bytes.

Source: R.-G. Dumitru et al., Layer-Wise Quantization, arXiv 2406.17415.
"""

from __future__ import annotations

from layerwise.errors import InputError
from layerwise.plan.measures import Measures, asked
from layerwise.plan.order import Level, differing, ordered_plan, read_levels
from layerwise.plan.tree import Allocation, Node
from layerwise.roles import Allocator
from layerwise.technique import BLOCK_INPUTS, option, technique


@technique(paper="LayerwiseQuant", needs={BLOCK_INPUTS})
class LayerwiseQuant(Allocator):
    """Two levels for whole blocks, the higher one for the blocks that turn their input most."""

    score: str = option("lim", choices=("lim", "zd"), help="lim: cosine of input and output; zd: outlying weights")
    levels: str = option("2/4/8/16", help="bits a weight; the budget lies between two of them")

    def __post_init__(self) -> None:
        super().__post_init__()
        read_levels(self.name, self.levels)

    def allocate(self, tree: Node, budget: int, measures: Measures | None = None) -> Allocation:
        known = asked(measures, self.name)

        def order(low: Level, high: Level) -> list[list[str]]:
            sites = differing(low, high)
            ranked = self.ranked(known)
            outside = [[site] for site in sites if known.places[site].block is None]
            return outside + [[s for s in sites if known.places[s].block == block] for block in ranked]

        return ordered_plan(tree, budget, read_levels(self.name, self.levels), known.places, order)

    def ranked(self, measures: Measures) -> list[str]:
        """Blocks, the most important first; ties in execution order."""
        found = measures.influence() if self.score == "lim" else measures.outliers()
        if not found:
            raise InputError("layerwise_quant ranks blocks, and this network has none; choose another allocator")
        sign = -1.0 if self.score == "lim" else 1.0
        return sorted(found, key=lambda block: sign * found[block])

    def objective(self, tree: Node, allocation: Allocation, measures: Measures | None = None) -> float:
        """An order has no sum to make small: it wants as many bytes raised as fit."""
        return -float(allocation.bytes)
